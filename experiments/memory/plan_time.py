"""How long `rlhf task=plan` takes for every file of the groups that a plan depends on, each in a process of its own.

    .venv/bin/python experiments/memory/plan_time.py                      # every group
    .venv/bin/python experiments/memory/plan_time.py model hardware      # these
    .venv/bin/python experiments/memory/plan_time.py model algorithm=dpo  # with an override of every plan

Seconds of the clock, and of the processor (all cores together), which count where other programs run too.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"
# what each size would be run on
HARDWARE = {
    "tiny": "cpu", "tiny_vision": "cpu", "gemma3_270m": "gpu_16gb", "gemma3_1b": "gpu_24gb", "gemma3_4b": "h200",
    "gemma3_12b": "gpu_4x24gb", "gemma3_27b": "tpu_v5e_8",
}  # fmt: skip
ONE_B = ["model=gemma3_1b", "hardware=gpu_24gb"]


def for_model(name: str, text: str) -> list[str]:
    return [f"hardware={HARDWARE[name.removesuffix('_it')]}", "algorithm.microbatch_size=8"]


def for_hardware(name: str, text: str) -> list[str]:
    """The largest model, and an algorithm with a reference."""
    return ["model=gemma3_27b", "algorithm=dpo", "algorithm.microbatch_size=8"]


def for_algorithm(name: str, text: str) -> list[str]:
    return [*ONE_B, *(["reward=length"] if "max_new_tokens" in text else [])]


def for_dataset(name: str, text: str) -> list[str]:
    only = {"labels": "kto", "unpaired": "kto", "scores": "reward_model", "mixture": "reward_model"}
    kind = next((kind for part, kind in only.items() if part in name), "sft")
    sees = ["model=gemma3_4b", "hardware=h200", "task.images=1"]
    return [f"algorithm={kind}", *(sees if name == "colours" else ONE_B), *(["dataset.path=rows"] * ("???" in text))]


def for_experiment(name: str, text: str) -> list[str]:
    judge = ["reward.reward_model.checkpoint=run"] if "/reward: reward_model" in text else []
    return ["hydra.mode=RUN", "model.checkpoint=run", *judge]


GROUPS: dict[str, Callable[[str, str], list[str]]] = {
    "model": for_model,
    "hardware": for_hardware,
    "algorithm": for_algorithm,
    "dataset": for_dataset,
    "experiment": for_experiment,
}


def timed(words: list[str]) -> tuple[float, float]:
    """(seconds of the clock, of the processor) of one plan, in a process of its own, Python's start included."""
    with tempfile.TemporaryDirectory() as folder:
        before, start = os.times(), time.perf_counter()
        command = [sys.executable, "-m", "rlhf", "task=plan", *words, f"hydra.run.dir={folder}"]
        done = subprocess.run(command, capture_output=True, text=True)
        after, seconds = os.times(), time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, used


def main() -> None:
    asked = [word for word in sys.argv[1:] if "=" not in word] or list(GROUPS)
    further = [word for word in sys.argv[1:] if "=" in word]
    print("| plan | seconds | processor seconds |\n|---|---|---|")
    for group in asked:
        for path in sorted((CONF / group).glob("*.yaml")):
            words = [f"{group}={path.stem}", *GROUPS[group](path.stem, path.read_text(encoding="utf-8")), *further]
            seconds, used = timed(words)
            print(f"| `{' '.join(words)}` | {seconds:.1f} | {used:.1f} |", flush=True)


if __name__ == "__main__":
    main()
