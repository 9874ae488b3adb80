"""Time this project and its peers on one tiny shape, interleaved: python experiments/speed/run.py --rounds 5

Every run is a process of its own on the same two cores; it prints a line when a step is done, and the clock is read
here. `start` is from the creation of the process to its first such line, `step` the median time between later ones
but for the last.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import ours

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from contenders import absolute, begin, interpreter_with  # noqa: E402

METHODS = ("sft", "dpo", "grpo", "ppo")
N_WARM_UP = 2  # steps that are not counted, after the first
# The last one isn't either: a loop that tells of a step when the next is on its way has nothing to wait for there.
N_STEPS_LEAST = N_WARM_UP + 4
_STEP = re.compile(r"\bstep +\d+/\d+")


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    package: str
    script: str
    methods: tuple[str, ...]


PEERS = (
    Peer("transformers loop", "torch transformers", "transformers_peer.py", ("sft",)),
    Peer("TRL", "trl", "trl_peer.py", ("sft", "dpo", "grpo")),
    Peer("Tunix", "tunix", "tunix_peer.py", ("sft", "dpo")),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """start, step: seconds. processor: seconds of both cores together a step. memory: gigabytes resident at most.
    others: cores that other processes used meanwhile."""

    start: float
    step: float
    processor: float
    memory: float
    others: float


def busy_seconds() -> float:
    """Processor time of the whole machine since it started, but for idling."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def used_seconds(process: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(patience: float) -> None:
    """Until other processes use less than a quarter of a core for three seconds, or patience ends."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        before = busy_seconds()
        time.sleep(3)
        if busy_seconds() - before < 0.75:
            return


def time_process(command: list[str], folder: Path) -> Run:
    """Run a contender and time its steps.

    Raises:
        RuntimeError: it failed; the message ends in what it printed last.
    """
    busy, started, at, used_at, printed = busy_seconds(), time.perf_counter(), [], [], []
    process = begin(command, folder)
    for line in process.stdout:
        printed.append(line)
        if _STEP.search(line):
            at.append(time.perf_counter())
            used_at.append(used_seconds(process.pid))
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status or len(at) < N_STEPS_LEAST:
        raise RuntimeError(f"{' '.join(command)} failed:\n{''.join(printed[-15:])}")
    others = (busy_seconds() - busy - used.ru_utime - used.ru_stime) / seconds
    step, processor = (
        statistics.median([b - a for a, b in itertools.pairwise(clock)][N_WARM_UP:-1]) for clock in (at, used_at)
    )
    return Run(at[0] - started, step, processor, used.ru_maxrss / 1e6, max(others, 0.0))


def contenders(method: str, n_steps: int, interpreters: list[str]) -> dict[str, list[str]]:
    """Command lines of the peers that are installed, by name."""
    found = {}
    for peer in PEERS:
        python = interpreter_with(peer.package, interpreters)
        if method in peer.methods and python is None:
            print(f"{peer.name}: skipped, no --peers-python has {peer.package}", flush=True)
        elif method in peer.methods:
            found[peer.name] = [python, str(HERE / peer.script), method, str(n_steps)]
    return found


def measure(method: str, args: argparse.Namespace, folder: Path) -> dict[str, list[Run]]:
    peers = contenders(method, args.steps, args.peers_python)
    runs: dict[str, list[Run]] = {}
    for number in range(args.rounds):
        cache = folder / f"{method}_programs_{number}"
        mine = {
            name: [
                *ours.command(method, args.steps, folder, folder / f"{method}_{number}_{name.split()[-1]}", cache),
                *(["hardware.remat=block"] if name == "rlhf, lean" else []),
            ]
            for name in ("rlhf, cold", "rlhf, warm", *(["rlhf, lean"] if ours.shape.NAME == "270m" else []))
            if args.only is None or name in args.only
        }
        peers = {name: command for name, command in peers.items() if args.only is None or name in args.only}
        for name, command in {**mine, **peers}.items():
            wait_for_quiet(args.patience)
            run = time_process(command, folder)
            runs.setdefault(name, []).append(run)
            print(f"  {method} round {number + 1} {name}: {json.dumps(dataclasses.asdict(run))}", flush=True)
    return runs


def table(method: str, runs: dict[str, list[Run]]) -> str:
    """Medians over the rounds, with the ratio of our step and start to each contender's, round by round."""

    def median(name, field):
        return statistics.median(getattr(run, field) for run in runs[name])

    def ratio(mine, name, field):
        if mine not in runs:
            return "–"
        pairs = zip(runs[mine], runs[name], strict=True)
        return f"{statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs):.2f}"

    heads = (
        f"{method.upper()}|step, s|ours ÷ it|processor, s a step|ours ÷ it|start, s|ours cold ÷ it|memory, GB|others"
    )
    lines = ["| " + heads.replace("|", " | ") + " |", "|---" * 9 + "|"]
    for name in runs:
        cells = [name]
        for field, mine in (("step", "rlhf, warm"), ("processor", "rlhf, warm"), ("start", "rlhf, cold")):
            cells += [f"{median(name, field):.2f}", ratio(mine, name, field)]
        cells += [f"{median(name, field):.2f}" for field in ("memory", "others")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps of each run")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--only", nargs="+", help="contenders to run, by the names of the table; all if not given")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for a quiet machine before each run")
    parser.add_argument(
        "--peers-python", nargs="+", default=[], help="interpreters that have peers; the first with a package runs it"
    )
    args = parser.parse_args()
    args.peers_python = absolute(args.peers_python)
    if args.steps < N_STEPS_LEAST:
        parser.error(
            f"--steps {args.steps} must be at least {N_STEPS_LEAST}: the first {N_WARM_UP + 1} and the last don't count"
        )
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        ours.write_rows(folder)
        print(
            f"{sys.version.split()[0]}, {os.cpu_count()} cores, {args.rounds} rounds of {args.steps} steps", flush=True
        )
        print("\n\n".join(table(method, measure(method, args, folder)) for method in args.methods))


if __name__ == "__main__":
    main()
