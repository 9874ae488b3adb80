"""How the final answer is read out of a text, and when two answers are the same."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from rlhf.config import config, require_range
from rlhf.errors import ConfigError, DataError
from rlhf.rewards.answers import MARKER, final_answer, is_same_number, reference_answer
from rlhf.rewards.format import require_tags
from rlhf.rewards.same_answer import is_same
from rlhf.rewards.tags import inside


class Extractor:
    """Reads answers. `repr` of it stands in results: which extractor is used moves accuracies by tens of points."""

    @abstractmethod
    def expected(self, reference: str, fields: Mapping[str, Any]) -> str:
        """The answer of a reference.

        Raises:
            DataError: there is none in it.
        """

    @abstractmethod
    def extract(self, text: str, fields: Mapping[str, Any]) -> str | None:
        """The final answer of a generated text; None: it does not have the form asked for."""

    @abstractmethod
    def is_same(self, first: str, second: str, fields: Mapping[str, Any]) -> bool:
        """Whether two answers to the same question are equal."""


@config
class Marked(Extractor):
    """The number behind the last marker, compared as a number: GSM8K's form (Cobbe et al., 2021).

    marker: what stands in front of it, in generated answers and in references.
    """

    marker: str = MARKER

    def __post_init__(self):
        if not self.marker.strip():
            raise ConfigError("marker of Marked must not be blank")

    def expected(self, reference, fields):
        return reference_answer(reference, self.marker)

    def extract(self, text, fields):
        return final_answer(text, self.marker)

    def is_same(self, first, second, fields):
        return is_same_number(first, second)


@config
class Tagged(Extractor):
    """What is in the last section of a tag, `<answer>…</answer>`, compared as text, number, list or choice.

    tag: its name. tolerance: relative, of numbers with decimals (see `rlhf.rewards.same_answer`).
    """

    tag: str = "answer"
    tolerance: float = 0.001

    def __post_init__(self):
        require_tags((self.tag,), "Tagged")
        require_range(self, "tolerance", at_least=0)

    def expected(self, reference, fields):
        if not reference.strip():
            raise DataError("the reference answer is empty")
        return reference

    def extract(self, text, fields):
        found = inside(text, self.tag)
        return None if found is None or not found.strip() else found.strip()

    def is_same(self, first, second, fields):
        return is_same(first, second, fields, self.tolerance)


@config
class Whole(Extractor):
    """The whole text of the answer, compared as text, number, list or choice.

    tolerance: relative, of numbers with decimals (see `rlhf.rewards.same_answer`).
    """

    tolerance: float = 0.001

    def __post_init__(self):
        require_range(self, "tolerance", at_least=0)

    def expected(self, reference, fields):
        if not reference.strip():
            raise DataError("the reference answer is empty")
        return reference

    def extract(self, text, fields):
        return text.strip() or None

    def is_same(self, first, second, fields):
        return is_same(first, second, fields, self.tolerance)
