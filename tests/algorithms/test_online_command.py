"""Online algorithms as a user runs them, on the tiny model: identities at learning rate 0, and files that are left."""

import json
import os
import subprocess
import sys

import pytest

SMALLEST = (
    "algorithm.batch_size=4", "algorithm.group_size=4", "algorithm.microbatch_size=4", "algorithm.max_new_tokens=6",
    "evaluation.rows=0", "reward=length", "reward.length.target=4",
)  # fmt: skip


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


ALGORITHMS = {
    "grpo": ("algorithm=grpo",),
    "grpo_lora": ("algorithm=grpo", "model.lora.rank=2", "algorithm.entropy_bonus=0.01"),
    "ppo": ("algorithm=ppo", "algorithm.epochs=2", "algorithm.critic.learning_rate=0", "algorithm.entropy_bonus=0.01"),
}


def run_as_users_do(folder, *words: str) -> str:
    """In a process of its own, compiled as runs are: whether two programs round alike depends on how that is done."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "rlhf", *words, "hardware.compilation_cache=null"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ALGORITHMS.values(), ids=ALGORITHMS)
def test_with_learning_rate_0_nothing_moves(chosen, small, tmp_path):
    words = [w for w in small if w.split("=")[0] not in {s.split("=")[0] for s in SMALLEST}]
    told = run_as_users_do(
        tmp_path, *chosen, "algorithm.learning_rate=0", "algorithm.minibatches=2", "algorithm.method.temperature=0.7",
        "algorithm.method.top_k=50", "trainer.samples_every=2", *words, *SMALLEST, "hydra.run.dir=run",
    )  # fmt: skip
    assert "4 prompts a step × 4 samples = 16 sequences = " in told
    assert "2 minibatches × 2 microbatches of 4" in told
    assert f"reference: {'on the policy' if 'model.lora.rank=2' in chosen else 'a copy of the weights'}" in told
    rows = rows_of(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["policy/ratio/max"] == row["policy/ratio"] == 1  # to the last bit
        assert row["policy/clipfrac"] == 0
        for name in ("kl/k1", "kl/k2", "kl/k3", "policy/approx_kl", "sampling/logp_difference"):
            assert abs(row[name]) < 1e-6, name
        assert row["time/rollout_seconds"] > 0
        assert row["time/reference_seconds"] > 0
        assert row["policy/entropy"] > 1
    shown = [row for row in rows_of(tmp_path / "run/samples.jsonl") if row["step"] == 2 and "advantage" in row]
    assert len(shown) == 16
    assert shown[0]["reward"] == max(row["reward"] for row in shown)
    assert shown[1]["reward"] == min(row["reward"] for row in shown)
