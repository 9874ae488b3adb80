"""Images through the real command: the embedded pictures, real ones, a tower that is frozen."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.data.batches import collate
from rlhf.data.colours import COLOURS, Colours
from rlhf.data.encode import encode
from rlhf.data.examples import Conversation
from rlhf.model.chat import Message
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.tokenizer import Tokenizer
from rlhf.model.vision import Vision
from rlhf.train.sources import locate

TINY = [
    "model=tiny_vision", "model.width=32", "model.ff_width=48", "model.heads=2", "model.kv_heads=1",
    "model.head_width=16", "model.layers=2", "model.pattern=2", "trainer.max_steps=2",
    "model.vision.width=16", "model.vision.ff_width=24", "model.vision.heads=2", "trainer.eval_rows=4",
    "evaluation.rows=0", "algorithm.batch_size=4", "algorithm.microbatch_size=4",
]  # fmt: skip
PICTURES = ["dataset=colours", "dataset.n_train=16", "dataset.n_eval=4"]


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_the_embedded_pictures_train(command, tmp_path, algorithm):
    done = command(*TINY, *PICTURES, f"algorithm={algorithm}", "hydra.run.dir=run")
    assert done.code == 0, done.output
    assert "train: " in done.output
    assert "images in " in done.output
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2]


def test_real_pictures_train(command, shared, tmp_path):
    path = shared / "data" / "mathvista_form" / "testmini.jsonl"
    words = [
        "dataset=prompts_jsonl", f"dataset.path={path}", "dataset.rows.question=query", "dataset.rows.answer=answer",
        "dataset.max_length=128", "dataset.on_long=truncate", "dataset.limit=8", "trainer.eval_rows=0",
    ]  # fmt: skip
    done = command(*TINY, *words, "algorithm=sft", "hydra.run.dir=run")
    assert done.code == 0, done.output
    assert "8 images in 8 rows, at most 1 in a row of a batch; each is resized to 32 × 32 and 4 tokens" in done.output
    assert all(np.isfinite(row["loss"]) for row in metrics(tmp_path / "run"))
    shown = command(*TINY, *words, "algorithm=sft", "debug=shapes", "hydra.run.dir=shown")
    assert "images 4 × 1 of 32 × 32 pixels (batch × slots); 4 slots filled" in shown.output


def test_a_frozen_tower_stays_and_a_run_with_it_can_be_gone_on_from(command, tmp_path):
    done = command(*TINY, *PICTURES, "algorithm=sft", "model.train_vision=false", "hydra.run.dir=first")
    assert done.code == 0, done.output
    assert "parameters, " in done.output
    assert "(100%)" not in done.output
    again = command(
        *TINY, *PICTURES, "algorithm=dpo", "model.train_vision=false", "model.checkpoint=first", "hydra.run.dir=next"
    )
    assert again.code == 0, again.output
    last, first = metrics(tmp_path / "first")[-1], metrics(tmp_path / "next")[0]
    assert first["val/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["val/loss"] < metrics(tmp_path / "first")[0]["val/loss"]


def test_a_text_model_says_what_to_do(command):
    done = command("dataset=colours", "dataset.n_train=4", "hydra.run.dir=run")
    assert done.code == 1
    assert "colours train row 0: the row has an image and model.vision is null: choose a model that sees" in done.output


LEARNING = [
    "model=tiny_vision", "model.width=64", "model.ff_width=128", "model.layers=2", "model.pattern=2",
    "model.head_width=16", "model.query_scale=0.25", "model.vision.image_size=16", "model.vision.width=32",
    "model.vision.ff_width=64", "model.vision.layers=1", "dataset=colours", "algorithm=sft",
    "algorithm.learning_rate=5e-3", "algorithm.batch_size=32", "algorithm.microbatch_size=32", "trainer.max_steps=120",
    "trainer.eval_rows=0", "evaluation.rows=0",
]  # fmt: skip


@pytest.mark.slow
def test_it_learns_to_see(command):
    """The likeliest of the six answers, for arrangements of colours that were not trained on."""
    done = command(*LEARNING, "hydra.run.dir=run")
    assert done.code == 0, done.output
    vision, tokenizer = Vision(16, 4, 32, 64, 1, 4, 4), Tokenizer()
    model = Gemma3(Architecture(1024, 64, 128, 2, 4, 2, 16, 0.25, 32, pattern=2, vision=vision))
    params = locate("run").load(model.architecture, "float32", None)
    data = Colours(max_length=64, n_eval=120)
    found = data.examples("eval", "conversation", vision)
    solutions = [f"{name}\n#### {number}" for number, name in enumerate(COLOURS, start=1)]
    said = [
        (source, Conversation((*example.messages[:-1], Message("assistant", answer))))
        for source, example in found
        for answer in solutions
    ]
    batch = collate(encode(said, "conversation", tokenizer, data, "answers", vision), range(len(said)))
    score = jax.jit(lambda rows: jnp.sum(model.token_logprobs(params, rows) * rows["is_answer"], axis=-1))
    right = np.array([solutions.index(example.messages[-1].content) for _, example in found])

    def accuracy(rows) -> float:
        return float(np.mean(np.asarray(score(rows)).reshape(-1, len(solutions)).argmax(axis=1) == right))

    assert accuracy(batch) > 0.85
    assert accuracy({**batch, "images": batch["images"] * 0}) < 0.4  # it looks
