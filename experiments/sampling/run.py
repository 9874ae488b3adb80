"""Time generation beside peers, interleaved: python experiments/sampling/run.py --rounds 3 --peers-python A B

Every run is a process of its own on the same two cores. `start` is from the creation of the process to its first
rollout done, compilation included (rlhf: without its cache on disk); rates are medians inside a process, and the table
has the medians over the rounds.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from contenders import absolute, begin, interpreter_with  # noqa: E402

CASES = ("rollout", "group", "queue")
PEERS = {"Tunix": ("tunix", "tunix_peer.py"), "transformers": ("torch transformers", "transformers_peer.py")}


def contenders(case: str, interpreters: list[str]) -> dict[str, list[str]]:
    """Interpreter, script and kind of weights by name; peers only where they are installed."""
    kinds = ("float32", "bfloat16", "int8") if case == "rollout" else ("float32",)
    found = {f"rlhf, {kind}": [sys.executable, "ours.py", kind] for kind in kinds}
    for name, (package, script) in PEERS.items() if case == "rollout" else ():
        python = interpreter_with(package, interpreters)
        if python is None:
            print(f"{name}: skipped, no --peers-python has {package}", flush=True)
        else:
            found[name] = [python, script, "float32"]
    return found


def time_process(command: list[str]) -> dict[str, float]:
    """Run a contender; its numbers with `start`, seconds, and `memory`, gigabytes resident at most.

    Raises:
        RuntimeError: it failed; the message ends in what it printed last.
    """
    started, start, numbers, printed = time.perf_counter(), 0.0, {}, []
    process = begin(command, HERE)
    for line in process.stdout:
        printed.append(line)
        if line.strip() == "ready":
            start = time.perf_counter() - started
        elif line.startswith("{"):
            numbers = json.loads(line)
    _, status, used = os.wait4(process.pid, 0)
    if status or not numbers:
        raise RuntimeError(f"{' '.join(command)} failed:\n{''.join(printed[-15:])}")
    return {**numbers, "start": start, "memory": used.ru_maxrss / 1e6}


def measure(case: str, size: str, args: argparse.Namespace) -> str:
    """A table of medians; contenders take turns, so that drift hits all."""
    runs: dict[str, list[dict[str, float]]] = {}
    known = contenders(case, args.peers_python)
    for number in range(args.rounds):
        for name, (python, script, kind) in known.items():
            numbers = time_process([python, script, case, size, kind, str(args.repeats)])
            runs.setdefault(name, []).append(numbers)
            print(f"  {case} {size} round {number + 1} {name}: {json.dumps(numbers)}", flush=True)
    names = list(next(iter(runs.values()))[0])
    lines = [f"| {case}, {size} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for contender, numbers in runs.items():
        cells = [f"{statistics.median(one[name] for one in numbers):.2f}" for name in names]
        lines.append(f"| {contender} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender")
    parser.add_argument("--repeats", type=int, default=3, help="measured rollouts in each process")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "270m"], choices=["tiny", "270m"])
    parser.add_argument("--peers-python", nargs="+", default=[], help="interpreters; the first with a package runs it")
    args = parser.parse_args()
    args.peers_python = absolute(args.peers_python)
    tables = [measure(case, size, args) for case in args.cases for size in args.sizes]
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    main()
