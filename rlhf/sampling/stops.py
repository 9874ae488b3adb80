"""Texts that end an answer, found in its tokens."""

from collections.abc import Callable, Sequence

from rlhf.errors import ConfigError
from rlhf.model.tokenizer import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes are shown as that are no whole character
_BYTES = 4  # of a character in UTF-8, at most


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


class TextStream:
    """The text of an answer in pieces, as its tokens come; the pieces together are the text.

    A piece ends where whole characters do, and where no stop text may have begun. is_stopped: a stop text is complete:
    the answer ends in front of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        if not all(stops):
            raise ConfigError("stop holds an empty text, which every answer begins with")
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.text = ""  # what was given
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The next token; what can be shown now."""
        self.ids.append(token)
        whole = self.tokenizer.decode(self.ids)
        end = first_stop(whole, self.stops)
        if end is not None:
            self.is_stopped = True
            return self._give(whole[:end])
        return self._give(whole[: len(whole) - self._n_open(whole)])

    def end(self) -> str:
        """What is left when no token follows."""
        whole = self.tokenizer.decode(self.ids)
        return self._give(whole[: first_stop(whole, self.stops)])

    def _n_open(self, text: str) -> int:
        """Characters at the end that the next tokens may change: bytes of one that is not whole, or a stop's head."""
        broken = len(text) - len(text.rstrip(_BROKEN))
        heads = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max([min(broken, _BYTES - 1), *heads])

    def _give(self, text: str) -> str:
        piece, self.text = text[len(self.text) :], max(self.text, text, key=len)
        return piece
