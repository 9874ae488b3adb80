"""Several datasets as one, each with a share of the rows.

For reward models above all, whose graded rows may be pairs in one set, judged or rated answers in another; but any form
that all parts can serve will do.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.config import config, require_range
from rlhf.data import joint
from rlhf.data.dataset import Data, Part
from rlhf.data.encode import Examples
from rlhf.data.examples import Form
from rlhf.errors import ConfigError, nearest
from rlhf.model.tokenizer import Tokenizer
from rlhf.model.vision import Vision

log = logging.getLogger(__name__)


@config
class Mixture(Data):
    """Training rows of each part in proportion to its weight, as many in all as the parts have; evaluation rows once
    each, from the parts that have some: the first row of every part, the second of every part, and so on, so that the
    first few rows are of all parts.

    parts: datasets by name.
    weights: share of each part, by the same names; they need not add up to 1.
    seed: which rows of a part come more often, or not at all, where its share is not that of its rows.
    limit: use at most so many training rows, in all, with the same shares; null: all.
    """

    parts: dict[str, Data]
    weights: dict[str, float]
    seed: int = 0
    limit: int | None = None

    def __post_init__(self):
        require_range(self, "seed", at_least=0)
        require_range(self, "limit", at_least=1)
        if not self.parts:
            raise ConfigError("dataset.parts is empty: a mixture needs a dataset or more, by name")
        for name in self.weights:
            if name not in self.parts:
                raise ConfigError(f"dataset.weights.{name} belongs to no part{nearest(name, self.parts)}")
        for name in self.parts:
            if name not in self.weights:
                raise ConfigError(f"dataset.weights.{name} is missing: every part of a mixture has a weight")
            if not self.weights[name] > 0:
                raise ConfigError(f"dataset.weights.{name}={self.weights[name]!r} must be above 0")

    def has_eval(self) -> bool:
        return any(part.has_eval() for part in self.parts.values())

    def check(self, form: Form) -> None:
        for name, part in self.parts.items():
            try:
                part.check(form)
            except ConfigError as error:
                raise ConfigError(f"dataset.parts.{name}: {error}") from None

    def load(self, part: Part, form: Form, tokenizer: Tokenizer, vision: Vision | None = None) -> Examples:
        chosen = {name: data for name, data in self.parts.items() if part == "train" or data.has_eval()}
        loaded = {name: data.load(part, form, tokenizer, vision) for name, data in chosen.items()}
        whole = _joined(list(loaded.values()))
        if part == "eval":
            return _dealt(whole, [len(examples) for examples in loaded.values()])
        return self._weighted(whole, {name: len(examples.packs) for name, examples in loaded.items()})

    def _weighted(self, whole: Examples, sizes: Mapping[str, int]) -> Examples:
        """The rows of each part as often as its weight says."""
        total, n_all = sum(self.weights.values()), sum(sizes.values())
        packs, places, start = [], [], 0
        for number, (name, size) in enumerate(sizes.items()):
            wanted = max(1, round(n_all * self.weights[name] / total))
            order = np.random.default_rng([self.seed, number]).permutation(size)
            packs += [whole.packs[start + order[place % size]] for place in range(wanted)]
            places += [(place + 0.5) / wanted for place in range(wanted)]  # each part spread evenly over the whole
            log.info("%s: %d of %d rows (%.2f times each of its own)", name, wanted, n_all, wanted / size)
            start += size
        if self.limit is None:
            return dataclasses.replace(whole, packs=packs, fingerprint=_digest(whole, packs))
        spread = np.argsort(places, kind="stable").tolist()
        return _taken(whole, [packs[place] for place in spread[: self.limit]])


def _dealt(whole: Examples, sizes: Sequence[int]) -> Examples:
    """Every row once: the first of each part, the second of each part, ...; parts that end early drop out."""
    if len(sizes) == 1:
        return whole
    places = [place for size in sizes for place in range(size)]
    rows = np.argsort(places, kind="stable").tolist()
    return _taken(whole, [(row,) for row in rows])


def _taken(whole: Examples, packs: Sequence[tuple[int, ...]]) -> Examples:
    """These packs alone, with the rows that they hold, in this order."""
    rows = list(dict.fromkeys(index for pack in packs for index in pack))
    place = {row: new for new, row in enumerate(rows)}

    def taken(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows] if len(values) == len(whole) else []  # none of another form's

    return dataclasses.replace(
        whole,
        sequences=taken(whole.sequences),
        packs=[tuple(place[index] for index in pack) for pack in packs],
        prompts=[dataclasses.replace(prompt, row=place[prompt.row]) for prompt in taken(whole.prompts)],
        is_desirable=taken(whole.is_desirable),
        grades=taken(whole.grades),
        sources=taken(whole.sources),
        pictures=taken(whole.pictures),
        fingerprint=_digest(whole, packs),
    )


def _digest(whole: Examples, packs: Sequence[tuple[int, ...]]) -> str:
    return hashlib.sha256(repr((whole.fingerprint, list(packs))).encode()).hexdigest()


def _joined(parts: list[Examples]) -> Examples:
    """The rows of all parts, one part behind the other."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    n_time = max(part.n_time for part in parts)
    n_joint = [part.n_joint for part in parts if part.n_joint is not None]
    shares_prompts = len(n_joint) == len(parts) and max(n_joint) <= joint.WORTH * 2 * n_time
    return dataclasses.replace(
        parts[0],
        sequences=[rows for part in parts for rows in part.sequences],
        packs=[
            tuple(index + start for index in pack)
            for part, start in zip(parts, starts, strict=False)
            for pack in part.packs
        ],
        prompts=[
            dataclasses.replace(prompt, row=prompt.row + start)
            for part, start in zip(parts, starts, strict=False)
            for prompt in part.prompts
        ],
        is_desirable=[label for part in parts for label in part.is_desirable],
        grades=[grade for part in parts for grade in part.grades],
        sources=[source for part in parts for source in part.sources],
        pictures=[shown for part in parts for shown in part.pictures],
        n_slots=max(part.n_slots for part in parts),
        n_time=n_time,
        n_joint=max(n_joint) if shares_prompts else None,
        n_dropped=sum(part.n_dropped for part in parts),
        n_truncated=sum(part.n_truncated for part in parts),
        fingerprint=hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest(),
    )
