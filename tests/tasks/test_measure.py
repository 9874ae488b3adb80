"""`task=evaluate`, `task=compare` and `task=rollout` as a user types them."""

import json
from pathlib import Path

import pytest

WORDS = (
    "model.width=32", "model.ff_width=48", "model.heads=2", "model.kv_heads=1", "model.head_width=16", "model.layers=2",
    "model.pattern=2", "dataset.n_train=48", "dataset.n_eval=16", "evaluation.rows=6", "evaluation.max_new_tokens=4",
    "trainer.eval_rows=0",
)  # fmt: skip
ONLINE = (
    "algorithm=grpo", "algorithm.batch_size=4", "algorithm.group_size=4", "algorithm.minibatches=1",
    "algorithm.microbatch_size=4", "algorithm.max_new_tokens=8",
)  # fmt: skip


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_two_checkpoints_are_measured_and_compared(command):
    """Random parameters of two seeds: the same prompts, answered twice by both, and scored together."""
    words = (*WORDS, "evaluation.method=standard", "evaluation.passes=2")
    for seed in (1, 2):
        rewards = ("reward=[gsm8k,length]", "reward.length.weight=0.5", f"hydra.run.dir=seed{seed}")
        done = command("task=evaluate", f"seed={seed}", *words, *rewards)
        assert done.code == 0, done.output
    made, rows = json.loads(Path("seed1/evaluation.json").read_text()), rows_of(Path("seed1/rows.jsonl"))
    assert (made["generation"], made["passes"], made["extractor"]) == ("standard", 2, "Marked(marker='####')")
    assert made["template"] == "Gemma 3 turns"
    assert made["example"].startswith("<bos><start_of_turn>user\n")
    assert {"pass@1", "pass@2_low", "maj@2", "rewards/gsm8k/mean", "rewards/length/std", "reward/mean"} <= set(made)
    assert len(rows) == 12
    assert made["reward/mean"] == pytest.approx(sum(row["reward"] for row in rows) / 12)
    assert rows[0]["reward"] == pytest.approx(rows[0]["rewards/gsm8k"] + 0.5 * rows[0]["rewards/length"])

    folders = ("task.baseline=seed1", "task.candidate=seed2")
    done = command("task=compare", *words, *folders, "reward=[length,repetition]", "hydra.run.dir=both")
    assert done.code == 0, done.output
    assert "no difference shown" in done.output
    found = json.loads(Path("both/comparison.json").read_text())
    assert found["differing"] == []
    assert found["accuracy"]["n"] == 6
    lengths = [[row["rewards/length"] for row in rows_of(Path(f"seed{n}/rows.jsonl"))] for n in (1, 2)]
    assert found["rewards/length"]["baseline"] == pytest.approx(sum(lengths[0]) / 12)
    assert found["rewards/length"]["candidate"] == pytest.approx(sum(lengths[1]) / 12)
    wins = sum((b > a) + 0.5 * (b == a) for a, b in zip(*lengths, strict=True)) / 12
    assert found["rewards/length"]["win_rate"] == pytest.approx(wins)

    now = command("task=compare", *words, "seed=2", "task.baseline=seed1", "hydra.run.dir=now")
    assert now.code == 0, now.output
    kept = rows_of(Path("seed2/rows.jsonl"))
    for row, old in zip(rows_of(Path("now/candidate/rows.jsonl")), kept, strict=True):
        assert row.items() <= old.items()  # the same answers, not scored there
    other = command("task=compare", *words, *folders[:1], "task.candidate=fewer")
    assert other.code == 1
    assert "fewer" in other.output.splitlines()[-2]
    Path("fewer").mkdir()
    Path("fewer/rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept[:6]))
    other = command("task=compare", *words, *folders[:1], "task.candidate=fewer")
    assert other.code == 1
    assert "the two have answers to different prompts: 6 and 3, 3 in common" in other.output


def test_a_run_judges_and_training_measures_rewards(command):
    """Random parameters say nothing that can be read: every answer is masked, and counted."""
    trained = command(
        "algorithm=sft", *WORDS, "algorithm.batch_size=4", "algorithm.microbatch_size=4", "trainer.max_steps=1",
        "reward=[length,repetition]", "hydra.run.dir=judge",
    )  # fmt: skip
    assert trained.code == 0, trained.output
    measured = rows_of(Path("judge/metrics.jsonl"))[0]
    assert measured["val/rewards/length/mean"] == pytest.approx(-abs(measured["val/mean_tokens"] - 32) / 32)
    assert measured["val/rewards/repetition/errors"] == 0
    judge = (
        "reward=judge",
        "reward.judge.checkpoint=judge",
        "reward.judge.max_new_tokens=4",
        "reward.judge.cache=kept",
    )
    done = command("task=evaluate", *WORDS, *judge, "hydra.run.dir=run")
    assert done.code == 0, done.output
    found = json.loads(Path("run/evaluation.json").read_text())
    assert (found["rewards/judge/unparsable"], found["rewards/judge/errors"]) == (1.0, 6)
    assert "of 6 answers masked, such as row" in done.output
    assert 1 <= len(rows_of(Path("kept"))) <= 6  # equal questions are asked once
    stopped = command("task=evaluate", *WORDS, *judge, "reward.judge.on_error=stop")
    assert stopped.code == 1
    assert "reward judge failed on row " in stopped.output


def test_a_batch_of_rollouts_is_shown_and_kept(command):
    done = command("task=rollout", *ONLINE, *WORDS, "reward=[gsm8k,length]", "task.n_shown=4", "hydra.run.dir=run")
    assert done.code == 0, done.output
    rows = rows_of(Path("run/rollouts.jsonl"))
    assert len(rows) == 16
    assert [row["row"] for row in rows] == [rows[n // 4 * 4]["row"] for n in range(16)]
    assert all(len(row["answer_ids"]) == len(row["logprobs"]) for row in rows)
    assert all(row["reward"] == pytest.approx(sum(row["rewards"].values())) for row in rows)
    table = done.output.split("reward    ")[1].split("written:")[0].strip().splitlines()[2:]
    assert len(table) == 4
    shown = [float(line.split()[0]) for line in table]
    rewards = sorted((row["reward"] for row in rows), reverse=True)
    assert shown == pytest.approx([rewards[0], rewards[1], rewards[-1], rewards[-2]], abs=1e-4)
    again = command("task=rollout", *ONLINE, *WORDS, "reward=length", "task.step=1", "hydra.run.dir=again")
    assert again.code == 0, again.output
    assert {row["row"] for row in rows_of(Path("again/rollouts.jsonl"))} != {row["row"] for row in rows}


def test_prompts_with_pictures(command):
    """They are answered, measured and rolled out like others."""
    words = (*WORDS[:7], "model=tiny_vision", "dataset=colours", "dataset.n_train=4", "dataset.n_eval=2")
    done = command("task=evaluate", *words, "evaluation.max_new_tokens=2", "trainer.eval_rows=0", "hydra.run.dir=run")
    assert done.code == 0, done.output
    rows = rows_of(Path("run/rows.jsonl"))
    assert len(rows) == 2
    assert all(row["prompt"].count("<start_of_image>") == 1 for row in rows)
    done = command("task=rollout", *ONLINE, *words, "algorithm.batch_size=2", "reward=gsm8k", "hydra.run.dir=rolled")
    assert done.code == 0, done.output
    assert "prompts with images can't be replayed" in done.output
    assert len(rows_of(Path("rolled/rollouts.jsonl"))) == 8


def test_only_algorithms_that_generate_roll_out(command):
    done = command("task=rollout", *WORDS, "algorithm=sft", "reward=length")
    assert done.code == 1
    assert (
        "task=rollout needs an algorithm that generates, such as algorithm=grpo; SFT learns from given" in done.output
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward=python"], "reward.python.function has no value yet: give one as reward.python.function=…"),
        (
            ["reward=[gsm8k,length]", "reward.gsm8k.corect=1"],
            "reward.gsm8k.corect: unknown key; did you mean reward.gsm8k.correct",
        ),
        (["reward=null"], "a group can't be set to null: GROUP=[] chooses none of it, such as reward=[]"),
        (
            ["reward=gsm8k", "+reward.gsm8k.corect=1"],
            "reward.gsm8k.corect is no setting of GSM8K; did you mean correct",
        ),
        (
            ["reward=length", "reward.length.target=no"],
            "reward.length.target='no' of Length must be an integer or none",
        ),
        (["reward=regex", "reward.regex.pattern='('"], "pattern='(' of Regex is no regular expression"),
    ],
)
def test_mistakes_in_rewards_are_told(command, words, message):
    done = command("task=evaluate", *WORDS, *words)
    assert done.code == 1
    assert message in done.output


def test_a_reward_without_a_key_of_its_own(command):
    """A yaml without the first line stands alone; in a list the line is asked for."""
    Path("mine/reward").mkdir(parents=True)
    Path("mine/reward/short.yaml").write_text("_target_: rlhf.rewards.length.Length\ntarget: 2\n")
    alone = command("--config-dir", "mine", "task=evaluate", *WORDS, "reward=short", "hydra.run.dir=run")
    assert alone.code == 0, alone.output
    assert "rewards/length/mean" in alone.output
    listed = command("--config-dir", "mine", "task=evaluate", *WORDS, "reward=[gsm8k,short]")
    assert listed.code == 1
    assert "rlhf.rewards.length.Length must begin with `# @package reward.<its name>`" in listed.output
