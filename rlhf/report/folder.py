"""What lies in the folder of a run, as far as it can be read: a report is also made of a run that broke off."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf.report.scale import Point

METRICS, SAMPLES, ANSWERS, ROLLOUTS = "metrics.jsonl", "samples.jsonl", "rows.jsonl", "rollouts.jsonl"
EVALUATION, COMPARISON, RESULT, STAGE = "evaluation.json", "comparison.json", "summary.json", "stage.json"
SHOWN = (METRICS, SAMPLES, ANSWERS, ROLLOUTS, EVALUATION, COMPARISON)  # a folder with one of these has a report

_LINE = re.compile(r"(\d\d):(\d\d):(\d\d) ([A-Z]+) (.*)")
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclasses.dataclass(frozen=True)
class Status:
    """How a run ended. kind: `finished`, `stopped` by a signal, `failed`, or `ended`: the log does not tell why."""

    kind: str
    text: str


class Run:
    """The folder of one run. What is missing or can't be read is empty or None; `problems` says what could not."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.problems: list[str] = []

    @functools.cached_property
    def rows(self) -> list[dict[str, float]]:
        """The rows of the metrics, numbers only, with NaN and the infinities as numbers."""
        return [
            {name: number for name, value in row.items() if (number := as_number(value)) is not None}
            for row in self.read_lines(METRICS)
            if isinstance(row.get("step"), int)
        ]

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The JSON objects of a file, line by line; lines that are none are counted in `problems`."""
        rows, n_broken = [], 0
        with contextlib.suppress(FileNotFoundError), (self.folder / name).open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                n_broken += not isinstance(row, dict)
                if isinstance(row, dict):
                    rows.append(row)
        if n_broken:
            self.problems.append(f"{name}: {n_broken} line{'s are' if n_broken > 1 else ' is'} no JSON object")
        return rows

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object of a file; empty where there is none."""
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError, OSError) as error:
            self.problems.append(f"{name} can't be read: {error}")
            return {}
        return found if isinstance(found, dict) else {}

    def points(self, name: str) -> list[Point]:
        """(step, value) of a metric, in the order of steps."""
        return sorted((row["step"], row[name]) for row in self.rows if name in row)

    @functools.cached_property
    def names(self) -> list[str]:
        """The metrics, in the order they first come in."""
        return [name for name in dict.fromkeys(name for row in self.rows for name in row) if name != "step"]

    @functools.cached_property
    def config_text(self) -> str:
        """The config as it was composed, without Hydra's own section."""
        with contextlib.suppress(OSError):
            text = (self.folder / ".hydra" / "config.yaml").read_text(encoding="utf-8", errors="replace")
            return text.partition("\nhydra:\n")[0].rstrip()
        return ""

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The config with references filled in, where the run stored it; else as it was composed."""
        stored = self.read_json("config.json")
        with contextlib.suppress(Exception):  # a yaml that someone edited may fail in many ways
            return stored or _plain(OmegaConf.create(self.config_text))
        return {}

    def setting(self, dotted: str) -> Any:
        """A value of the config by its full name; None where it is not there."""
        node: Any = self.config
        for name in dotted.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    @functools.cached_property
    def choices(self) -> dict[str, str]:
        """The file chosen of each group of the config, as Hydra stored it."""
        with contextlib.suppress(Exception):
            stored = _plain(OmegaConf.load(self.folder / ".hydra" / "hydra.yaml"))
            return {name: choice for name, choice in stored["hydra"]["runtime"]["choices"].items() if choice}
        return {}

    @functools.cached_property
    def overrides(self) -> list[str]:
        """The settings of the command line."""
        with contextlib.suppress(Exception):
            return [str(word) for word in OmegaConf.load(self.folder / ".hydra" / "overrides.yaml")]
        return []

    @property
    def command(self) -> str:
        return " ".join(["rlhf", *(shlex.quote(word) for word in self.overrides)])

    @functools.cached_property
    def log(self) -> str:
        with contextlib.suppress(OSError):
            return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        return ""

    def told(self, pattern: str) -> str | None:
        """What a message of the log has in the pattern's group; of several, the last."""
        found = re.findall(rf"(?m)^[\d:]{{8}} INFO {pattern}", self.log)
        return found[-1] if found else None

    @functools.cached_property
    def n_steps(self) -> int | None:
        """Steps that the run has when it is finished."""
        text = self.told(r".*; ([\d,]+) steps over [\d,]+ ")
        return int(text.replace(",", "")) if text else None

    @property
    def last_step(self) -> int:
        return max((int(row["step"]) for row in self.rows), default=0)

    @property
    def measured_at_end(self) -> dict[str, float]:
        """What an algorithm measured after its last step, such as what normalises a reward model's scores."""
        found = re.findall(r"(?m)^[\d:]{8} INFO after the last step: (\S+) (\S+)$", self.log)
        return {name: float(value) for name, value in found if re.fullmatch(r"[-+.\deE]+|nan|inf|-inf", value)}

    @functools.cached_property
    def warnings(self) -> list[str]:
        """What the log warns of, each text once."""
        return list(dict.fromkeys(re.findall(r"(?m)^[\d:]{8} WARNING (.*)$", self.log)))

    @functools.cached_property
    def seconds(self) -> int | None:
        """From the first line of the log to its last."""
        times = [3600 * int(h) + 60 * int(m) + int(s) for h, m, s, *_ in _LINE.findall(self.log)]
        return sum((now - before) % 86400 for before, now in itertools.pairwise(times)) if times else None

    @functools.cached_property
    def status(self) -> Status:
        """How the run ended, by its log and its rows."""
        of = f" of {self.n_steps:,}" if self.n_steps else ""
        after = f"after step {self.last_step:,}{of}"
        end = re.split(r"(?m)^[\d:]{8} INFO .*$", self.log)[-1]  # of the log, where a run tells why it ended
        errors = re.findall(r"(?m)^[\d:]{8} ERROR (.*(?:\n(?![\d:]{8} [A-Z]+ ).*)*)", end)
        if errors:
            message = errors[-1].strip()
            lines = [line for line in message.splitlines() if line.strip()]
            reason = lines[-1] if "Traceback (most recent call last)" in message else message
            return Status("failed", f"failed {after}: {reason}")
        if stopped := re.findall(r"(?m)^[\d:]{8} WARNING (SIG\w+): stopped after step", end):
            return Status("stopped", f"stopped {after} by {stopped[-1]}; resume={self.folder} goes on")
        if self.n_steps and self.rows and self.last_step < self.n_steps:
            return Status("ended", f"the log ends {after}: still going on, or killed")
        if not self.rows and not any((self.folder / name).is_file() for name in SHOWN):
            return Status("ended", "nothing was measured")
        return Status("finished", f"finished{f': {self.last_step:,} steps' if self.rows else ''}")

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """The libraries that wrote the newest checkpoint."""
        for path in sorted(self.folder.glob("checkpoints/step_*/manifest.json"), key=_step_of, reverse=True):
            content = self.read_json(str(path.relative_to(self.folder))).get("content")
            if isinstance(content, dict) and isinstance(content.get("versions"), dict):
                return content["versions"]
        return {}


def as_number(value: Any) -> float | int | None:
    """A number, also where JSON has it as text; None where it is none."""
    if isinstance(value, str):
        return _NUMBERS.get(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def runs_in(folder: Path) -> list[Path]:
    """The folders of runs directly inside, in the order of their numbers or names; where there are none, those of runs
    further inside (`hydra.sweep.subdir` may name folders in folders)."""
    for depth in ("*", "**"):
        found = {path.parent.parent for path in folder.glob(f"{depth}/.hydra/overrides.yaml")}
        found |= {path.parent for path in folder.glob(f"{depth}/{RESULT}")}
        if found := found - {folder}:
            break
    return sorted(found, key=lambda path: [(len(part), part) for part in re.split(r"(\d+)", str(path))])


def _step_of(path: Path) -> int:
    number = path.parent.name.removeprefix("step_")
    return int(number) if number.isdigit() else -1


def _plain(node: Any) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=False)  # type: ignore[return-value]


def pairs_of(words: list[str]) -> Iterator[tuple[str, str]]:
    """(key, value) of the overrides that set one."""
    for word in words:
        key, is_set, value = word.lstrip("+").partition("=")
        if is_set:
            yield key, value
