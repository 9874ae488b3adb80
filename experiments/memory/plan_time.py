"""How long `rlhf task=plan` takes for every model file, each with the hardware that it would be run on.

    .venv/bin/python experiments/memory/plan_time.py algorithm=dpo algorithm.microbatch_size=8

Seconds of the clock, and of the processor (all cores together), which count where other programs run too. Further words
are overrides of every plan.
"""

import os
import subprocess
import sys
import tempfile
import time

HARDWARE = {
    "tiny": "cpu", "tiny_vision": "cpu", "gemma3_270m": "gpu_16gb", "gemma3_1b": "gpu_24gb", "gemma3_4b": "h200",
    "gemma3_12b": "gpu_4x24gb", "gemma3_27b": "tpu_v5e_8",
}  # fmt: skip


def hardware_of(model: str) -> str:
    return HARDWARE[model.removesuffix("_it")]


def timed(model: str, words: list[str]) -> tuple[float, float]:
    """(seconds of the clock, of the processor) of one plan, in a process of its own, Python's start included."""
    command = [sys.executable, "-m", "rlhf", "task=plan", f"model={model}", f"hardware={hardware_of(model)}", *words]
    with tempfile.TemporaryDirectory() as folder:
        before, start = os.times(), time.perf_counter()
        subprocess.run([*command, f"hydra.run.dir={folder}"], check=True, capture_output=True)
        after, seconds = os.times(), time.perf_counter() - start
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, used


def main() -> None:
    print("| model | hardware | seconds | processor seconds |\n|---|---|---|---|")
    for name in HARDWARE:
        for model in (name,) if name.startswith("tiny") else (name, f"{name}_it"):
            seconds, used = timed(model, sys.argv[1:])
            print(f"| `{model}` | `{hardware_of(model)}` | {seconds:.1f} | {used:.1f} |", flush=True)


if __name__ == "__main__":
    main()
