"""Worked answers in two tagged sections: their form, the final answer, and how the reasoning looks.

Made for mathematics with or without pictures; rows of MathVista say what type of answer they want, and are heeded.
"""

import re
from collections.abc import Sequence

from rlhf.config import config, require_range
from rlhf.errors import ConfigError, DataError
from rlhf.rewards.base import Answered, Reward
from rlhf.rewards.format import require_tags
from rlhf.rewards.same_answer import choices_of, is_same, overlap, quantity
from rlhf.rewards.tags import inside, share_in_order

_WINDOW = 20_000  # characters of the reasoning that are looked at
_STEP = re.compile(
    r"^[ \t]*(?:step\b|\d+[.)]|[-*•])|\b(?:first|next|then|so|thus|hence|therefore|because|since|finally)\b",
    re.IGNORECASE | re.MULTILINE,
)
_NOTATION = re.compile(r"[0-9a-z)\]}][ \t]*(?:[-+*/×÷·^<>=≤≥≠]|\\[a-z]+)[ \t]*[-(\[{\\0-9a-z$]", re.IGNORECASE)


@config
class MathReasoning(Reward):
    """format_weight × form + answer_weight × answer + reasoning_weight × quality of the reasoning, each from 0 to 1.

    Form: the share of `<reasoning>…</reasoning><answer>…</answer>` that is there, once and in order.
    Answer: what is in the last answer section against the reference: 1 if it is the same text, number or choice; for
    words, overlap × the F1 of the words. 0 without the section.
    Quality: the mean, by weights, of length, steps and notation of the reasoning section.

    reasoning_tag, answer_tag: names of the sections. tolerance: relative, of numbers with decimals; whole numbers must
    be met, and MathVista's floats to their precision. Signs count; units may be missing but not differ.
    overlap: most that words in common earn.
    least_words, most_words: the length is 1 between them, less in proportion outside.
    steps: so many lines that begin a step, or words that lead to one (then, so, because …), are 1.
    notation: so many operations or relations in symbols are 1.
    length_weight, steps_weight, notation_weight: in the quality.
    """

    format_weight: float = 0.2
    answer_weight: float = 1.0
    reasoning_weight: float = 0.1
    reasoning_tag: str = "reasoning"
    answer_tag: str = "answer"
    tolerance: float = 0.001
    overlap: float = 0.5
    least_words: int = 10
    most_words: int = 300
    steps: int = 3
    notation: int = 2
    length_weight: float = 1.0
    steps_weight: float = 1.0
    notation_weight: float = 1.0

    def __post_init__(self):
        require_tags((self.reasoning_tag, self.answer_tag), "MathReasoning")
        require_range(self, "tolerance", "overlap", "length_weight", "steps_weight", "notation_weight", at_least=0)
        require_range(self, "least_words", "steps", "notation", at_least=1)
        require_range(self, "most_words", at_least=self.least_words)
        if not self.length_weight + self.steps_weight + self.notation_weight:
            raise ConfigError("one of length_weight, steps_weight, notation_weight of MathReasoning must be above 0")

    def __call__(self, answers: Sequence[Answered], step: int) -> list[float]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answered) -> float:
        if answer.reference is None:
            raise DataError(f"the reward math_reasoning needs reference answers; row {answer.row} has none")
        text = answer.completion
        found, reasoning = inside(text, self.answer_tag), inside(text, self.reasoning_tag)
        form = share_in_order(text, (self.reasoning_tag, self.answer_tag))
        right = 0.0 if found is None else self.answer_score(found, answer)
        quality = 0.0 if reasoning is None else self.quality(reasoning)
        return self.format_weight * form + self.answer_weight * right + self.reasoning_weight * quality

    def answer_score(self, found: str, answer: Answered) -> float:
        """How right the text of an answer section is, 0 to 1."""
        reference = answer.reference or ""
        if is_same(found, reference, answer.fields, self.tolerance):
            return 1.0
        if choices_of(answer.fields) or quantity(reference) is not None:
            return 0.0
        return self.overlap * overlap(found, reference)

    def quality(self, reasoning: str) -> float:
        """How a reasoning section looks, 0 to 1."""
        text = reasoning[:_WINDOW]
        n_words = len(reasoning.split())
        length = min(n_words / self.least_words, 1.0, self.most_words / max(n_words, 1))
        steps = min(len(_STEP.findall(text)) / self.steps, 1.0)
        notation = min(len(_NOTATION.findall(text)) / self.notation, 1.0)
        weights = self.length_weight, self.steps_weight, self.notation_weight
        parts = zip(weights, (length, steps, notation), strict=True)
        return sum(weight * part for weight, part in parts) / sum(weights)
