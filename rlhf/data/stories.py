"""The wording of the embedded word problems: a chain told as a question, solved in lines, and solved wrongly.

A solution has GSM8K's form (Cobbe et al., 2021): one step a line, then `#### ` and the result.
"""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rlhf.data.chains import LARGEST, Chain, Step, calculate, canonical, split_of, splits_by_chain

Fault = Literal["wrong_step", "wrong_number", "missing_format", "rambling"]
FAULTS: tuple[Fault, ...] = ("wrong_step", "wrong_number", "missing_format", "rambling")

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack")
THINGS = ("apples", "books", "cards", "coins", "eggs", "nuts", "pens", "shells", "stamps", "stones")
HOLDERS = ("bags", "boxes", "jars", "packs")
CHANGES = {
    "+": ("buys {} more", "finds {} more", "gets {} more", "picks up {}", "wins {}"),
    "-": ("drops {}", "gives away {}", "loses {}", "sells {}", "uses up {}"),
}
THEN = ("Then", "Later", "After that")
FILLERS = (
    "Let me think about this.",
    "This needs some care.",
    "So far so good.",
    "Let us look at it once more.",
    "That was the easy part.",
    "Now I go on slowly.",
)
SYSTEM = ("You solve word problems.", "Show each step.", "Be short and end with ####.", "You are a patient teacher.")


class Story(NamedTuple):
    """A chain in words. opening and turn: what happens in step one and two; the questions ask for their results."""

    opening: str
    first_question: str
    turn: str
    last_question: str

    @property
    def question(self) -> str:
        return f"{self.opening} {self.turn} {self.last_question}"


def pick(rng: random.Random, choices: Sequence):
    """One of `choices`; uses `rng.random` alone, whose sequence is the same in every Python."""
    return choices[int(rng.random() * len(choices))]


def tell(chain: Chain, rng: random.Random) -> Story:
    """The chain as a story with drawn names, things and verbs."""
    name, things = pick(rng, NAMES), pick(rng, THINGS)
    if chain.signs[0] == "*":
        opening = f"{name} {pick(rng, ('has', 'fills'))} {chain.first} {pick(rng, HOLDERS)} of {chain.second} {things}."
    else:
        change = pick(rng, CHANGES[chain.signs[0]]).format(chain.second)
        opening = f"{name} has {chain.first} {things} and {change}."
    turn = f"{pick(rng, THEN)} {name} {pick(rng, CHANGES[chain.signs[1]]).format(chain.third)}."
    asked = (f"How many {things} does {name} have now?", f"How many {things} are there now?", "How many is that?")
    return Story(opening, f"How many {things} is that?", turn, pick(rng, asked))


def solve(steps: Sequence[Step]) -> str:
    """The steps a line each, then the result."""
    return "\n".join((*map(str, steps), f"#### {steps[-1].result}"))


def spoil(chain: Chain, fault: Fault, rng: random.Random) -> str | None:
    """A plausible answer with one fault; None where this chain can't have it.

    wrong_step: one operation is another one; the rest follows from it, to another result.
    wrong_number: one result is off by 1, 2, 3 or 10; the rest follows from it, to another result.
    missing_format: the steps and the result are right, the line `#### result` is absent.
    rambling: the steps, the result and the format are right, with a repeated step and empty talk around them.

    The wrong steps, too, are no chain of another split.
    """
    if fault == "wrong_step":
        return _take_wrong_step(chain, rng)
    if fault == "wrong_number":
        return _miscalculate(chain, rng)
    lines = [str(step) for step in chain.steps]
    if fault == "missing_format":
        return "\n".join([*lines, pick(rng, ("", "The answer is {}.", "So it is {}."))]).format(chain.result).strip()
    repeated = _repeated(chain, pick(rng, (0, 1)))
    first = int(rng.random() * len(FILLERS))
    second = (first + 1 + int(rng.random() * (len(FILLERS) - 1))) % len(FILLERS)
    return "\n".join([FILLERS[first], *lines, FILLERS[second], str(repeated), f"#### {chain.result}"])


def _repeated(chain: Chain, place: int) -> Step:
    """The step in this place, or the last: the first right behind the last may be a chain of another split."""
    first, last = chain.steps
    is_own = splits_by_chain().get(canonical((last, first)), split_of(chain)) == split_of(chain)
    return first if place == 0 and is_own else last


def _take_wrong_step(chain: Chain, rng: random.Random) -> str | None:
    wrong = []
    for place in (0, 1):
        sign = {"+": "-", "-": "+", "*": "+"}[chain.signs[place]]
        signs = sign + chain.signs[1] if place == 0 else chain.signs[0] + sign
        other = chain._replace(signs=signs)
        possible = all(0 < step.result <= LARGEST for step in other.steps)
        if possible and other.result != chain.result and split_of(other) == split_of(chain):
            wrong.append(other)
    return solve(pick(rng, wrong).steps) if wrong else None


def _miscalculate(chain: Chain, rng: random.Random) -> str | None:
    slip = pick(rng, (1, 2, 3, 10)) * pick(rng, (-1, 1))
    first, last = chain.steps
    if rng.random() < 0.5:
        middle = first.result + slip
        end = calculate(middle, last.sign, last.right)
        steps = (first._replace(result=middle), Step(middle, last.sign, last.right, end))
    else:
        steps = (first, last._replace(result=last.result + slip))
    is_possible = all(0 < step.result <= LARGEST for step in steps)
    is_own = splits_by_chain().get(canonical(steps), split_of(chain)) == split_of(chain)
    return solve(steps) if is_possible and is_own else None
