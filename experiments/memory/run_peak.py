"""The peak that `rlhf task=plan` predicts, against the most memory that a whole run of the same words holds on a CPU.

    .venv/bin/python experiments/memory/run_peak.py algorithm=grpo model=gemma3_270m model.checkpoint=null …

Measured is `VmHWM` of the run's process: Python, JAX and its compiled programs are in it, which the plan leaves out.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def rlhf(*words: str) -> list[str]:
    return [sys.executable, "-m", "rlhf", "hardware=cpu", *words]


def peak_of(command: list[str]) -> int:
    """Most bytes that were resident at once in a process."""
    process, most = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
        most = max([most, *(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))])
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"exit status {process.returncode}: {' '.join(command)}")
    return most


def main() -> None:
    words = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        plan = rlhf(*words, "task=plan", "task.advise=false", f"hydra.run.dir={folder}/plan")
        subprocess.run(plan, check=True, stdout=subprocess.DEVNULL)
        predicted = json.loads((Path(folder) / "plan" / "plan.json").read_text(encoding="utf-8"))["peak_bytes"]
        measured = peak_of(rlhf(*words, f"hydra.run.dir={folder}/run"))
    print("| predicted, GB | measured, GB | predicted ÷ measured |\n|---|---|---|")
    print(f"| {predicted / 1e9:.2f} | {measured / 1e9:.2f} | {predicted / measured:.3f} |")


if __name__ == "__main__":
    main()
