"""Two-step equation chains: what an embedded word problem is about, apart from its wording.

Train, validation and test are disjoint by chain: a hash of the operations and operands decides, so an equation chain of
a test problem occurs in no training row whatever the wording. a + b and b + a count as the same.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable
from typing import Literal, NamedTuple

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LARGEST = 99  # of every result

# operations of the two steps -> how often such a problem is drawn
KINDS = {"++": 5, "+-": 5, "-+": 5, "--": 3, "*+": 2, "*-": 1}


class Step(NamedTuple):
    """One equation: left sign right = result."""

    left: int
    sign: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.sign}{self.right}={self.result}"


class Chain(NamedTuple):
    """(first sign second) sign third."""

    first: int
    signs: str
    second: int
    third: int

    @property
    def steps(self) -> tuple[Step, Step]:
        middle = calculate(self.first, self.signs[0], self.second)
        end = calculate(middle, self.signs[1], self.third)
        return Step(self.first, self.signs[0], self.second, middle), Step(middle, self.signs[1], self.third, end)

    @property
    def result(self) -> int:
        return self.steps[1].result

    @property
    def canonical(self) -> str:
        """The chain as text, with the operands of a sum or product in order."""
        return canonical(self.steps)


def calculate(left: int, sign: str, right: int) -> int:
    return left + right if sign == "+" else left - right if sign == "-" else left * right


def canonical(steps: Iterable[Step]) -> str:
    """The operations and operands of the steps as text, whatever their results."""
    return " ".join(_ordered(step.left, step.sign, step.right) for step in steps)


def _ordered(left: int, sign: str, right: int) -> str:
    return f"{right}{sign}{left}" if sign != "-" and right < left else f"{left}{sign}{right}"


def split_of(chain: Chain) -> Split:
    """The only split in whose rows `chain` may occur: 80 % train, 5 % validation, 15 % test."""
    share = int.from_bytes(hashlib.sha256(chain.canonical.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.8 else "validation" if share < 0.85 else "test"


@functools.cache
def splits_by_chain() -> dict[str, Split]:
    """The split of every chain, by its canonical text."""
    return {chain.canonical: split for split, kinds in chains().items() for found in kinds.values() for chain in found}


@functools.cache
def chains() -> dict[Split, dict[str, list[Chain]]]:
    """Every chain, by split and kind, in a fixed order: 4,373 in all, 3,857 but for the order of operands.

    The first operand is 2 to 20 (2 to 5 in a product), the others 2 to 9, all results 1 to 99.
    """
    found: dict[Split, dict[str, list[Chain]]] = {split: {kind: [] for kind in KINDS} for split in SPLITS}
    for kind in KINDS:
        largest = 5 if kind[0] == "*" else 20
        for first, second in itertools.product(range(2, largest + 1), range(2, 10)):
            middle = calculate(first, kind[0], second)
            for third in range(2, 10):
                if 0 < middle <= LARGEST and 0 < calculate(middle, kind[1], third) <= LARGEST:
                    chain = Chain(first, kind, second, third)
                    found[split_of(chain)][kind].append(chain)
    return found
