"""Reward models through the real entry point: trained, normalised, evaluated, asked; and PPO with one."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.errors import CheckpointError
from rlhf.rewards.base import Answered
from rlhf.rewards.reward_model import RewardModel, token_ids
from rlhf.train.checkpoint import components, load_parameters

ROWS = ("dataset.n_train=48", "dataset.n_eval=16")
TRAIN = ("algorithm=reward_model", "algorithm.learning_rate=1e-3", "algorithm.normalise_rows=24")


@pytest.fixture
def sized(small):
    """Small runs whose model fits to each other."""
    return [word for word in small if not word.startswith(("dataset.", "evaluation.rows"))]


def shape(words) -> list[str]:
    """Of the model alone."""
    return [word for word in words if word.startswith("model.")]


def test_a_reward_model_of_a_mixture(command, sized, tmp_path):
    """Trained on pairs, labels and ratings, its outputs over the stated rows have mean 0 and standard deviation 1."""
    sizes = ("n_train=16", "n_eval=8")
    parts = [f"dataset.parts.{name}.{size}" for name in ("pairs", "labels", "scores") for size in sizes]
    done = command(*TRAIN, "dataset=mixture", *parts, *sized, "hydra.run.dir=rm", "trainer.eval_rows=24")
    assert done.code == 0, done.output
    assert "pairs: 29 of 48 rows (1.81 times each of its own)" in done.output
    assert "raw outputs over " in done.output
    rows = [json.loads(line) for line in (tmp_path / "rm/metrics.jsonl").read_text().splitlines()]
    assert {"val/rewards/accuracies", "val/rewards/label_accuracies", "val/rewards/squared_errors"} <= rows[-1].keys()
    assert rows[0]["val/loss"] != rows[-1]["val/loss"]
    assert "val/accuracy" not in rows[-1]  # it grades answers: it is not asked for any
    head = load_parameters(tmp_path / "rm")[0]["head"]
    assert float(head["scale"]) > 0
    assert float(head["scale"]) != 1


def test_from_a_reward_model_to_ppo(command, sized, tmp_path):
    """evaluate, score, and a PPO whose reward and critic it is, and whose policy is a model again."""
    assert command(*TRAIN, *ROWS, *sized, "hydra.run.dir=rm").code == 0
    _is_normalised_and_read(command, sized, tmp_path)
    _scores_files(command, sized, tmp_path)
    online = ("algorithm=ppo", "algorithm.max_new_tokens=8", "reward=[reward_model,length]", *ROWS, *sized)
    done = command(
        *online, "model.checkpoint=rm", "reward.reward_model.checkpoint=rm", "algorithm.critic.start=rm",
        "reward.length.weight=0.5", "algorithm.epochs=2", "algorithm.minibatches=2", "algorithm.microbatch_size=2",
        "evaluation.rows=0", "trainer.samples_every=2", "hydra.run.dir=ppo",
    )  # fmt: skip
    assert done.code == 0, done.output
    assert "critic: rm, a reward model" in done.output
    last = json.loads((tmp_path / "ppo/metrics.jsonl").read_text().splitlines()[-1])
    total = last["rewards/reward_model/mean"] + 0.5 * last["rewards/length/mean"]
    np.testing.assert_allclose(last["reward/mean"], total, rtol=1e-4)
    assert components(tmp_path / "ppo") == ["critic", "model"]
    sampled = [json.loads(line) for line in (tmp_path / "ppo/samples.jsonl").read_text().splitlines()]
    assert {"reward", "advantage", "text"} <= {key for row in sampled for key in row}
    again = command(
        "task=evaluate", "model.checkpoint=ppo", "trainer.eval_rows=8", "evaluation.rows=2", *shape(sized), *ROWS
    )
    assert again.code == 0, again.output
    assert "critic of " in again.output
    assert "not read" in again.output


def _is_normalised_and_read(command, sized, tmp_path):
    done = command(
        "task=evaluate", "task.group_by=rejected_model", *TRAIN, *ROWS, *sized, "model.checkpoint=rm",
        "trainer.eval_rows=16", "hydra.run.dir=evaluated",
    )  # fmt: skip
    assert done.code == 0, done.output
    result = json.loads((tmp_path / "evaluated/evaluation.json").read_text())
    assert sum(group["n"] for group in result["accuracy_by_group"].values()) == result["n_pairs"] == 16
    assert set(result["accuracy_by_group"]) <= {"wrong_step", "wrong_number", "missing_format", "rambling"}
    assert sum(result["margins"]["n"]) == sum(one["n"] for one in result["calibration"]["bins"]) == 16
    assert result["rewards/accuracies_low"] <= result["rewards/accuracies"] <= result["rewards/accuracies_high"]
    assert -1 <= result["length_correlation"] <= 1
    margin = result["rewards/chosen"] - result["rewards/rejected"]
    np.testing.assert_allclose(result["rewards/margins"], margin, rtol=1e-4, atol=1e-6)


def _scores_files(command, sized, tmp_path):
    asked, good, bad = {"role": "user", "content": "2+2?"}, "4", "5"
    (tmp_path / "answers.jsonl").write_text(
        "\n".join(
            map(
                json.dumps,
                [
                    {"messages": [asked, {"role": "assistant", "content": good}]},
                    {"prompt": "2+2?", "completion": good},
                    {"prompt": [asked], "chosen": good, "rejected": bad},
                    {"text": "no turns at all"},
                ],
            )
        )
    )
    done = command("task=score", "file=answers.jsonl", "model.checkpoint=rm", *shape(sized), "hydra.run.dir=scored")
    assert done.code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "scored/scores.jsonl").read_text().splitlines()]
    assert [row["place"].rsplit(":")[-1] for row in rows] == ["1", "2", "3", "4"]
    np.testing.assert_allclose([rows[1]["score"], rows[2]["chosen"]], rows[0]["score"], atol=1e-6)
    assert rows[2]["rejected"] != rows[2]["chosen"]
    (tmp_path / "bad.jsonl").write_text(json.dumps({"answer": 3}))
    bad = command("task=score", "file=bad.jsonl", "model.checkpoint=rm", *shape(sized), "hydra.run.dir=scored2")
    assert bad.code == 1
    assert "bad.jsonl:1: nothing to score: there are columns answer, known are" in bad.output


def test_a_model_without_a_head_is_refused(command, sized, tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    done = command("task=score", "file=texts.txt", *shape(sized))
    assert done.code == 1
    assert "task=score needs model.checkpoint=…, the run of a reward model" in done.output


class Loaded:
    """What a checkpoint without a head gives."""

    def __init__(self):
        self.others = {}


def test_a_reward_that_is_no_reward_model_is_refused():
    with pytest.raises(CheckpointError, match=r"reward\.reward_model\.checkpoint=mine is no reward model"):
        RewardModel(checkpoint="mine").connect(lambda checkpoint: Loaded())


def answered(tokenizer, completion: str, **settings) -> Answered:
    prompt = "<bos><start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\n"
    return Answered(prompt, completion, None, {}, 3, settings.pop("is_truncated", False), **settings)


def test_answers_become_the_tokens_of_a_conversation():
    """Whether by the policy's own ids or by text; a cut answer has no end."""
    from rlhf.model.chat import ChatTemplate, Message
    from rlhf.model.tokenizer import Tokenizer

    tokenizer = Tokenizer()
    template = ChatTemplate(tokenizer)
    whole = template.conversation([Message("user", "How many?"), Message("assistant", "3+4=7\n#### 7")])
    expected = whole.tokens[: len(whole.tokens) - len(tokenizer.encode("\n"))]
    assert token_ids(answered(tokenizer, "3+4=7\n#### 7"), tokenizer) == expected
    assert token_ids(answered(tokenizer, "3+4=7\n#### 7", is_truncated=True), tokenizer) == expected[:-1]
    prompt = tuple(template.prompt([Message("user", "How many?")]))
    ids = (*tokenizer.encode("3+4=7\n#### 7"), tokenizer.eos)
    by_ids = answered(tokenizer, "3+4=7\n#### 7", prompt_ids=prompt, answer_ids=ids)
    assert token_ids(by_ids, tokenizer) == expected


def test_training_on_from_a_reward_model_begins_without_its_normalisation():
    from rlhf.algorithms.reward_model import RewardModel as Algorithm

    algorithm = Algorithm(learning_rate=1e-3, batch_size=4, microbatch_size=4)
    head = {"weight": jnp.ones(4), "bias": jnp.float32(3), "scale": jnp.float32(2)}
    found = algorithm.components({"model": {"final_norm": jnp.zeros(4)}, "head": head}, None, 0)["head"]
    assert (found["weight"].tolist(), float(found["bias"]), float(found["scale"])) == ([1, 1, 1, 1], 0.0, 1.0)
    new = algorithm.components({"model": {"final_norm": jnp.zeros(4)}}, None, 0)["head"]
    assert float(jnp.abs(new["weight"]).sum()) > 0
