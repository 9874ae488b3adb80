"""For which shapes generation is compiled: few, chosen from the prompts to come; a call takes the cheapest that fits.

Which shape serves a call depends on the call and on what was announced before, never on what happens to be compiled:
a run that is gone on with generates with the shapes, and so with the roundings, that it began with.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhf.errors import ConfigError
from rlhf.sampling.rules import ALTERNATIVES

SMALLEST = 16  # tokens of the smallest bucket
SLOTS = 64  # answers that are written at once, unless asked for otherwise
_READING = 16  # rows that cost as much as reading the weights does, about
_WORTH = 2.0  # a shape is made where those that are there would take so many times its time


@dataclasses.dataclass(frozen=True)
class Shape:
    """What programs are compiled for.

    entries: prompts that are answered at once. lanes: answers to each of them that are written at once.
    prompt_tokens, new_tokens: the longest prompt and answer there is room for.
    has_alternatives: whether the most likely tokens are reported.
    """

    entries: int
    lanes: int
    prompt_tokens: int
    new_tokens: int
    has_alternatives: bool = False

    @property
    def rows(self) -> int:
        return self.entries * self.lanes

    def holds(self, other: "Shape") -> bool:
        """Whether what fits into the other fits into this one; any number of prompts and answers goes through both."""
        fits = self.prompt_tokens >= other.prompt_tokens and self.new_tokens >= other.new_tokens
        return fits and self.has_alternatives >= other.has_alternatives

    def cost(self, n_prompts: int, n: int) -> float:
        """How long n answers to each of so many prompts take, beside the cost of other shapes."""
        rounds = -(-n_prompts // self.entries) * -(-n // self.lanes)
        return rounds * (_READING + self.rows * (1 + (self.prompt_tokens + self.new_tokens) / 2048))

    def __str__(self) -> str:
        lanes = f" × {self.lanes} answers" if self.lanes > 1 else ""
        return f"{self.entries} prompts{lanes}, ≤ {self.prompt_tokens} + {self.new_tokens} tokens"


@dataclasses.dataclass(frozen=True)
class Use:
    """What will be asked.

    prompt_lengths: tokens of the prompts to come. n_prompts: of a call, at most. n: answers to each. n_images: of a
    prompt, at most.
    """

    prompt_lengths: Sequence[int]
    n_prompts: int
    max_new_tokens: int
    n: int = 1
    slots: int = SLOTS
    has_alternatives: bool = False
    n_images: int = 0

    @classmethod
    def of(cls, prompts: Sequence[Any], n_prompts: int, max_new_tokens: int, n: int, slots: int) -> "Use":
        """For these prompts (`rlhf.sampling.sampler.Prompt`)."""
        lengths, images = zip(*((len(one.token_ids), len(one.pictures)) for one in prompts), strict=True)
        return cls(lengths, n_prompts, max_new_tokens, n, slots, n_images=max(images))

    def shapes(self) -> list[Shape]:
        """One with room for the longest prompt; and a shorter one, where at least half of the calls fit into half."""
        numbers = self.n, max(self.prompt_lengths), self.max_new_tokens, self.slots, self.has_alternatives
        whole = shape_for(self.n_prompts, *numbers)
        # The longest of n_prompts is below this one as often as not.
        usual = float(np.quantile(self.prompt_lengths, 0.5 ** (1 / self.n_prompts), method="higher"))
        short = dataclasses.replace(whole, prompt_tokens=bucket(int(usual), SMALLEST))
        return [whole, short] if 2 * short.prompt_tokens <= whole.prompt_tokens else [whole]


def bucket(n: int, smallest: int) -> int:
    """The least of 2^k and 3 · 2^k that holds n, and at least `smallest`."""
    power = 1 << (n - 1).bit_length()
    return max(smallest, power * 3 // 4 if n <= power * 3 // 4 else power)


def shape_for(
    n_prompts: int, n: int, prompt_tokens: int, new_tokens: int, slots: int = SLOTS, has_alternatives: bool = False
) -> Shape:
    """The shape that a call is compiled for.

    All prompts get an entry and all samples a lane where these are at most `slots`. Else more prompts at once are
    better than more samples of each: when a prompt's last samples are written, its other lanes have nothing to do.
    """
    entries, lanes = bucket(n_prompts, 1), bucket(n, 1)
    if entries * lanes > slots:
        lanes = min(lanes, max(1, slots // entries))
        entries = min(entries, max(1, slots // lanes))
    return Shape(entries, lanes, bucket(prompt_tokens, SMALLEST), bucket(new_tokens, SMALLEST), has_alternatives)


def planned(shapes: Sequence[Shape], uses: Iterable[Use]) -> list[Shape]:
    """`shapes` and what the uses need besides: none where one that is there takes less than twice the time."""
    found = list(shapes)
    for use in uses:
        for shape in use.shapes():
            other = cheapest(found, shape, use.n_prompts, use.n, use.slots)
            if other is None or other.cost(use.n_prompts, use.n) > _WORTH * shape.cost(use.n_prompts, use.n):
                found.append(shape)
    return found


def cheapest(shapes: Iterable[Shape], least: Shape, n_prompts: int, n: int, slots: int) -> Shape | None:
    """Of the shapes with room for `least` and at most `slots` rows the one that answers soonest; None if none has."""
    fitting = [shape for shape in shapes if shape.holds(least) and shape.rows <= slots]
    return min(fitting, key=lambda shape: shape.cost(n_prompts, n), default=None)


def check_fits(shape: Shape, longest: int, max_new_tokens: int, n_alternatives: int) -> None:
    """Raises ConfigError if a call has longer prompts or answers, or asks for more, than the shape has room for."""
    if not 0 <= n_alternatives <= ALTERNATIVES:
        raise ConfigError(f"n_alternatives={n_alternatives} must be from 0 to {ALTERNATIVES}")
    if n_alternatives and not shape.has_alternatives:
        raise ConfigError(f"n_alternatives={n_alternatives} needs a shape with has_alternatives")
    if longest > shape.prompt_tokens:
        raise ConfigError(f"a prompt has {longest} tokens, and the shape has room for {shape.prompt_tokens}")
    if max_new_tokens > shape.new_tokens:
        raise ConfigError(f"max_new_tokens={max_new_tokens}, and the shape has room for {shape.new_tokens}")
