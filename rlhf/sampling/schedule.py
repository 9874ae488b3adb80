"""Who is answered when: prompts wait, are prefilled, take an entry, and leave it when their answers have ended.

A fixed number of entries and lanes is kept busy: when an answer ends, the next sample of its prompt takes the lane, and
when a prompt has none left, the next prompt takes the entry. Which answer comes out does not depend on any of it.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from rlhf.model.gemma3 import Tree
from rlhf.model.sharding import whole
from rlhf.sampling import programs
from rlhf.sampling.cache import LayerCache, Pictures
from rlhf.sampling.programs import Prompts, Seats, Setting
from rlhf.sampling.rules import Rules
from rlhf.sampling.shapes import Shape

_FOREVER = np.int32(np.iinfo(np.int32).max)


@dataclasses.dataclass(frozen=True)
class PromptImages:
    """The images of one prompt. soft_tokens: [time], as `Gemma3.embed` takes them. images: [n, size, size, 3]."""

    soft_tokens: np.ndarray
    images: np.ndarray


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt to answer. row: what the noise of its answers depends on. least, most: tokens of an answer."""

    tokens: Sequence[int]
    n_samples: int
    row: int
    method: tuple[float, ...]
    least: int
    most: int
    pictures: PromptImages | None = None


@dataclasses.dataclass(frozen=True)
class Ended:
    """One answer. scores: [tokens, 3], see `Answers`. likely: ids and log-probabilities, [tokens, n] each."""

    task: int
    sample: int
    tokens: np.ndarray
    scores: np.ndarray
    likely: tuple[np.ndarray, np.ndarray] | None
    reason: str


def prefill_chunk(prompt_tokens: int) -> int:
    """Tokens of a prompt that go through the model at once; divides the length of the bucket."""
    return min(128 if jax.default_backend() == "cpu" else 512, prompt_tokens & -prompt_tokens)


def stage_size(shape: Shape, has_images: bool) -> int:
    """Prompts that go through the model at once: enough to keep its matrix products busy."""
    chunk = shape.prompt_tokens if has_images else prefill_chunk(shape.prompt_tokens)
    return max(1, min(shape.entries, (256 if jax.default_backend() == "cpu" else 4096) // chunk))


class Stage:
    """Prefilled prompts that wait for an entry. waiting: place and task of each."""

    def __init__(self, setting: Setting, shape: Shape, weights: Tree, tasks: dict[int, Task], n_images: int):
        time, first = shape.prompt_tokens, next(iter(tasks.values()))
        has_images = first.pictures is not None
        chunk, size = time if has_images else prefill_chunk(time), stage_size(shape, has_images)
        self.setting, self.waiting = setting, deque(enumerate(tasks))
        self.tokens = np.zeros((size, time), np.int32)
        self.lengths = np.ones(size, np.int32)
        for place, task in enumerate(tasks.values()):
            self.tokens[place, : len(task.tokens)] = task.tokens
            self.lengths[place] = len(task.tokens)
        pictures = None if first.pictures is None else _pictures(list(tasks.values()), size, time, n_images)
        chunks = np.int32(0), np.int32(-(-int(self.lengths.max() - 1) // chunk))
        empty = programs.empty_stage(setting, size, time)
        self.cache: list[LayerCache] = programs.prefill(setting, weights, empty, self.tokens, chunks, chunk, pictures)

    def seat(self, prompts: Prompts, entries: list[int]) -> tuple[Prompts, list[int]]:
        """Put the next waiting prompts to these entries, as far as there are any; the tasks that they are."""
        size = len(self.lengths)
        chosen = [self.waiting.popleft() for _ in range(min(len(entries), len(self.waiting)))]
        filled = np.zeros((2, size), np.int32)
        filled[0, : len(chosen)] = [place for place, _ in chosen]
        filled[1, : len(chosen)] = entries[: len(chosen)]
        seats = Seats(np.int32(len(chosen)), *filled)
        prompts = programs.seat(self.setting, prompts, self.cache, self.tokens, self.lengths, seats)
        return prompts, [task for _, task in chosen]


def _pictures(tasks: Sequence[Task], size: int, time: int, n_images: int) -> Pictures:
    """The images of a stage; places without any, black ones and no soft token."""
    filled = [task.pictures for task in tasks if task.pictures is not None]
    first = filled[0].images
    soft_tokens = np.zeros((size, time), np.int32)
    images = np.zeros((size, n_images, *first.shape[1:]), first.dtype)
    for place, own in enumerate(filled):
        soft_tokens[place, : len(own.soft_tokens)] = own.soft_tokens
        images[place, : len(own.images)] = own.images
    return Pictures(jnp.asarray(soft_tokens), jnp.asarray(images))


@dataclasses.dataclass
class _Entry:
    """A place of a prompt. n_started, n_ended: of the answers to the task that is there."""

    task: int = -1
    n_samples: int = 0
    n_started: int = 0
    n_ended: int = 0

    @property
    def is_free(self) -> bool:
        return self.n_ended == self.n_samples


class Schedule:
    """Tasks on their way through the programs of one shape.

    watch: told the token ids of an answer so far; says after how many of them it ends, if it does.
    n_drawn, n_places: tokens drawn so far, and how many could have been with every row busy all the time.
    """

    def __init__(
        self,
        setting: Setting,
        shape: Shape,
        weights: Tree,
        rules: Rules,
        key: Key[Array, ""],
        tasks: Sequence[Task],
        watch: Callable[[list[int]], int | None] | None = None,
    ):
        self.setting, self.shape, self.weights, self.rules, self.key = setting, shape, weights, rules, key
        self.tasks, self.watch = tasks, watch
        # Prompts of like length go through the prefill together.
        order = sorted(range(len(tasks)), key=lambda i: (tasks[i].pictures is not None, -len(tasks[i].tokens)))
        self.queue = deque(order)
        self.stage: Stage | None = None
        self.prompts, self.answers = programs.empty(setting, shape)
        self.rows = programs.idle_rows(shape.rows)
        self.entries = [_Entry() for _ in range(shape.entries)]
        self.owners: list[tuple[int, int] | None] = [None] * shape.rows  # task and sample
        self.n_drawn = self.n_places = 0
        most = max([len(task.pictures.images) for task in tasks if task.pictures is not None], default=0)
        self.n_images = 1 << max(most - 1, 0).bit_length()

    def run(self, every: int | None = None) -> Iterator[list[Ended]]:
        """Answers as they end. every: come back at least after so many tokens, if only with an empty list."""
        limit = _FOREVER if every is None else np.int32(every)
        while True:
            self._admit()
            n_active = int(self.rows.is_active.sum())
            if not n_active:
                return
            is_any_waiting = bool(
                self.queue
                or (self.stage is not None and self.stage.waiting)
                or any(entry.n_started < entry.n_samples for entry in self.entries)
            )
            until = np.int32(n_active - 1 if is_any_waiting else 0), limit
            before = self.rows.steps
            self.answers, rows = programs.decode(
                self.setting, self.weights, self.prompts, self.answers, self.rows, self.rules, self.key, until
            )
            self.rows = jax.tree.map(np.array, jax.device_get(whole(rows)))
            drawn = self.rows.steps - before
            self.n_drawn += int(drawn.sum())
            self.n_places += int(drawn.max()) * len(drawn)
            yield self._collect()

    def so_far(self, row: int) -> list[int]:
        """The tokens of the answer that a row is writing."""
        return np.asarray(whole(self.answers.tokens))[row, : self.rows.steps[row]].tolist()

    def _admit(self) -> None:
        """Prompts into free entries, then their samples into free lanes."""
        while free := [number for number, entry in enumerate(self.entries) if entry.is_free]:
            if (self.stage is None or not self.stage.waiting) and self.queue:
                self.stage = self._next_stage()
            if self.stage is None or not self.stage.waiting:
                break
            self.prompts, tasks = self.stage.seat(self.prompts, free)
            for number, task in zip(free, tasks, strict=False):
                self.entries[number] = _Entry(task, self.tasks[task].n_samples)
        for number, entry in enumerate(self.entries):
            for row in range(number * self.shape.lanes, (number + 1) * self.shape.lanes):
                if self.owners[row] is None and entry.n_started < entry.n_samples:
                    self._start(row, entry.task, entry.n_started)
                    entry.n_started += 1

    def _next_stage(self) -> Stage:
        has_pictures = self.tasks[self.queue[0]].pictures is not None
        size = stage_size(self.shape, has_pictures)
        chosen: dict[int, Task] = {}
        while self.queue and len(chosen) < size:
            if (self.tasks[self.queue[0]].pictures is not None) != has_pictures:
                break
            number = self.queue.popleft()
            chosen[number] = self.tasks[number]
        return Stage(self.setting, self.shape, self.weights, chosen, self.n_images)

    def _start(self, row: int, number: int, sample: int) -> None:
        task, rows = self.tasks[number], self.rows
        self.owners[row] = number, sample
        rows.is_active[row], rows.steps[row], rows.last[row] = True, 0, task.tokens[-1]
        rows.least[row], rows.most[row], rows.numbers[row] = task.least, task.most, (task.row, sample)
        for values, value in zip(rows.method, task.method, strict=True):
            values[row] = value

    def _collect(self) -> list[Ended]:
        """The answers that have ended, whose rows become free."""
        is_owned = np.array([owner is not None for owner in self.owners])
        looked_at = np.flatnonzero(is_owned & (~self.rows.is_active | (self.watch is not None)))
        if not len(looked_at):
            return []
        tokens, scores, likely = jax.device_get(whole((self.answers.tokens, self.answers.scores, self.answers.likely)))
        is_stop, ended = self.is_stop, []
        for row in looked_at.tolist():
            n = int(self.rows.steps[row])
            end = None if self.watch is None else self.watch(tokens[row, :n].tolist())
            if end is None and self.rows.is_active[row]:
                continue
            reason = "stop_text" if end is not None else "stop" if is_stop[tokens[row, n - 1]] else "length"
            n = n if end is None else end
            self.rows.is_active[row] = False
            owner, self.owners[row] = self.owners[row], None
            self.entries[row // self.shape.lanes].n_ended += 1
            own = None if likely is None else (likely[0][row, :n].copy(), likely[1][row, :n].copy())
            assert owner is not None
            ended.append(Ended(*owner, tokens[row, :n].copy(), scores[row, :n].copy(), own, reason))
        return ended

    @functools.cached_property
    def is_stop(self) -> np.ndarray:
        return np.asarray(self.rules.is_stop)
