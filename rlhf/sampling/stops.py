"""Texts that end an answer, found in its tokens."""

from collections.abc import Callable, Sequence

from rlhf.errors import ConfigError
from rlhf.model.tokenizer import Tokenizer


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where in the text the first of `stops` begins; None if none is there."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)


def stop_watch(tokenizer: Tokenizer, stops: Sequence[str]) -> Callable[[list[int]], int | None] | None:
    """Says after how many of an answer's tokens one of `stops` is complete in its text; None if there are no stops.

    Raises:
        ConfigError: a stop is empty: it would be in every text.
    """
    if not stops:
        return None
    if not all(stops):
        raise ConfigError("stop holds an empty text, which every answer begins with")

    def ends_after(ids: list[int]) -> int | None:
        if first_stop(tokenizer.decode(ids), stops) is None:
            return None
        return next(n for n in range(1, len(ids) + 1) if first_stop(tokenizer.decode(ids[:n]), stops) is not None)

    return ends_after
