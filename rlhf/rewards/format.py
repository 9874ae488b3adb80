"""Whether an answer has the form asked for: sections in tags, each once and in order."""

from collections.abc import Sequence

from rlhf.config import config
from rlhf.errors import ConfigError
from rlhf.rewards.base import Answered, Reward
from rlhf.rewards.tags import is_only, share_in_order


@config
class Format(Reward):
    """complete: for `<a>…</a><b>…</b>` with every tag once, closed, filled and in order; else partial × the share of
    the tags that are so.

    tags: names, in the order wanted. is_strict: for `complete`, only white space may stand outside the tags.
    """

    tags: tuple[str, ...] = ("reasoning", "answer")
    complete: float = 1.0
    partial: float = 0.0
    is_strict: bool = True

    def __post_init__(self):
        require_tags(self.tags, "Format")

    def __call__(self, answers: Sequence[Answered], step: int) -> list[float]:
        return [self._score(answer.completion) for answer in answers]

    def _score(self, text: str) -> float:
        share = share_in_order(text, self.tags)
        if share == 1 and (not self.is_strict or is_only(text, self.tags)):
            return self.complete
        return self.partial * share


def require_tags(tags: Sequence[str], owner: str) -> None:
    """Refuse names that make no tags.

    Raises:
        ConfigError
    """
    if not tags or len(set(tags)) < len(tags) or any(not tag or set(tag) & set("<>/ \n") for tag in tags):
        raise ConfigError(f"tags={list(tags)} of {owner} must be different names without <, > or /")
