"""Slices of the public sets through the real command: read, encoded, trained on, evaluated, answered."""

import json
import re

import pytest

TINY = [
    "model.width=32", "model.ff_width=48", "model.heads=2", "model.kv_heads=1", "model.head_width=16",
    "model.layers=2", "model.pattern=2",
    "dataset.max_length=96", "dataset.on_long=truncate", "dataset.eval_limit=8", "trainer.eval_rows=8",
    "evaluation.rows=4", "evaluation.max_new_tokens=4", "algorithm.batch_size=8", "algorithm.microbatch_size=8",
]  # fmt: skip
# one batch again and again: the loss must fall
REPEATED = [
    "dataset.limit=8", "trainer.epochs=null", "trainer.max_steps=6", "algorithm.learning_rate=1e-2",
    "algorithm.schedule.warmup=0",
]  # fmt: skip


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(command, shared, folder: str, dataset: str, data: str, *words: str):
    path = f"dataset.path={shared / 'data' / data}"
    return command(*TINY, *REPEATED, f"dataset={dataset}", path, *words, f"hydra.run.dir={folder}")


@pytest.mark.parametrize(
    ("dataset", "data", "algorithm"),
    [
        ("no_robots", "no_robots_form", "sft"),
        ("gsm8k", "gsm8k", "sft"),
        ("capybara_dpo", "capybara_dpo_form", "dpo"),
        ("hh_rlhf", "hh_rlhf", "dpo"),
        ("hh_rlhf", "hh_rlhf", "kto"),
    ],
)
def test_each_set_trains(command, shared, tmp_path, dataset, data, algorithm):
    limit = ["dataset.limit=4"] if algorithm == "kto" else []  # each pair is a good and a bad answer
    done = train(command, shared, "run", dataset, data, f"algorithm={algorithm}", *limit)
    assert done.code == 0, done.output
    found = metrics(tmp_path / "run")
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4, 5, 6]
    losses = [row["loss"] for row in found[1:]]
    assert losses[-1] < 0.8 * losses[0], losses
    if algorithm == "dpo":
        assert found[-1]["rewards/accuracies"] == 1.0
        assert {"val/rewards/accuracies", "val/loss"} <= found[-1].keys()
    if algorithm == "kto":
        assert found[-1]["rewards/margins"] > found[1]["rewards/margins"]
    if dataset == "gsm8k":
        assert found[-1]["val/n"] == 4  # answers generated and compared with the number behind ####
        assert "val/accuracy" in found[-1]


def test_every_row_is_read_or_counted(command, shared, tmp_path):
    words = ["algorithm=dpo", "task=shapes", "dataset.limit=null", "dataset.on_long=drop", "dataset.max_length=1024"]
    done = train(command, shared, "run", "capybara_dpo", "capybara_dpo_form", *words)
    assert done.code == 0, done.output
    n_rows = (shared / "data" / "capybara_dpo_form" / "train.jsonl").read_bytes().count(b"\n")
    kept = int(re.search(r"train: (\d+) preference rows", done.output)[1])
    dropped = int(re.search(r"train: (\d+) rows longer than 1024 tokens left out", done.output)[1])
    assert kept + dropped == n_rows
    assert dropped > 0


@pytest.fixture
def preferred(command, shared, tmp_path):
    """A folder with a DPO run that started from an SFT run."""
    words = ["hh_rlhf", "hh_rlhf"]
    assert train(command, shared, "start", *words, "algorithm=sft").code == 0
    done = train(command, shared, "dpo", *words, "algorithm=dpo", "model.checkpoint=start", "dataset.limit=64")
    assert done.code == 0, done.output
    return tmp_path / "dpo"


def test_evaluate_agrees_with_the_run_and_generate_answers(command, shared, preferred, tmp_path):
    data = ["dataset=hh_rlhf", f"dataset.path={shared / 'data' / 'hh_rlhf'}", "model.checkpoint=dpo"]
    done = command(*TINY, *data, "algorithm=dpo", "task=evaluate", "hydra.run.dir=measured")
    assert done.code == 0, done.output
    found = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    last = metrics(preferred)[-1]
    names = [name.removeprefix("val/") for name in last if name.startswith("val/")]
    assert {"rewards/accuracies", "rewards/margins", "loss"} <= set(names)
    for name in names:
        assert found[name] == pytest.approx(last[f"val/{name}"], rel=1e-4, abs=1e-5), name
    assert found["rewards/accuracies"] == last["val/rewards/accuracies"]
    assert last["val/rewards/margins"] != 0  # the reference is what the run started from, not where it ended
    assert found["n_scored"] == 8
    assert 0 <= found["rewards/accuracies_low"] < found["rewards/accuracies"] < found["rewards/accuracies_high"] <= 1
    scored = [json.loads(line) for line in (tmp_path / "measured" / "scored.jsonl").read_text().splitlines()]
    assert [row["row"] for row in scored] == list(range(8))

    (tmp_path / "questions.txt").write_text("How are you?\n\nWhat is the capital of France?\n", encoding="utf-8")
    answered = command(*TINY, "task=generate", "prompts=questions.txt", "model.checkpoint=dpo", "hydra.run.dir=answers")
    assert answered.code == 0, answered.output
    rows = [json.loads(line) for line in (tmp_path / "answers" / "generations.jsonl").read_text().splitlines()]
    assert [row["prompt"][-1]["content"] for row in rows] == ["How are you?", "What is the capital of France?"]
    assert all(isinstance(row["answer"], str) for row in rows)
    assert "> What is the capital of France?" in answered.output
