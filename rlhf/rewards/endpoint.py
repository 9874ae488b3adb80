"""Asking an OpenAI-compatible HTTP endpoint many questions at once, each with retries, all within a time."""

import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.errors import ConfigError
from rlhf.rewards.base import Failed

log = logging.getLogger(__name__)

_FIRST_WAIT = 0.25  # seconds before the second attempt; it doubles
_LARGEST = 1 << 20  # bytes of a reply that are read
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses that may pass


class _Temporary(Exception):
    """Worth another attempt, after so many seconds if the server says so."""

    def __init__(self, reason: str, after_seconds: float | None = None):
        super().__init__(reason)
        self.after_seconds = after_seconds


class Endpoint:
    """`POST {url}/chat/completions`, greedy.

    key_variable: environment variable with the key; no key is sent where it is not set. request_seconds: for one
    attempt. retries: further attempts after a time-out, a lost connection, a busy or failing server, a malformed reply.
    """

    def __init__(self, url: str, model: str, key_variable: str, max_tokens: int, request_seconds: float, retries: int):
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.max_tokens, self.request_seconds, self.retries = max_tokens, request_seconds, retries
        key = os.environ.get(key_variable)
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def ask(self, text: str, deadline: float) -> str | Failed:
        """The reply to one message.

        Raises:
            ConfigError: the server refuses the request as such.
        """
        reason = ""
        for attempt in range(self.retries + 1):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                return self._post(text, min(self.request_seconds, left))
            except _Temporary as error:
                reason = str(error)
                wait = min(_FIRST_WAIT * 2.0**attempt if error.after_seconds is None else error.after_seconds, 30.0)
                if attempt < self.retries:
                    log.warning("%s: %s; attempt %d of %d", self.url, reason, attempt + 2, self.retries + 1)
                    time.sleep(max(0.0, min(wait, deadline - time.monotonic())))
        return Failed(f"{self.url}: {reason or 'no time was left for it'}")

    def _post(self, text: str, seconds: float) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self._headers)
        try:
            with urllib.request.urlopen(request, timeout=seconds) as reply:
                return _content(reply.read(_LARGEST))
        except urllib.error.HTTPError as error:
            told = f"status {error.code}: {error.read(300).decode('utf-8', 'replace').strip()}"
            if error.code not in _AGAIN:
                raise ConfigError(f"reward.judge.endpoint={self.url}: {told}") from None
            after = error.headers.get("Retry-After", "")
            raise _Temporary(told, float(after) if after.isdigit() else None) from None
        except TimeoutError:
            raise _Temporary(f"no reply within {seconds:.3g} s") from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            cause = getattr(error, "reason", error)
            raise _Temporary(f"{type(cause).__name__}: {cause}") from None


def _content(body: bytes) -> str:
    found: Any = json.loads(body)["choices"][0]["message"]["content"]
    if not isinstance(found, str):
        raise ValueError(f"the reply's content is {type(found).__name__}, not text")
    return found


def ask_all(
    ask: Callable[[str, float], str | Failed], texts: Sequence[str], n_threads: int, seconds: float
) -> list[str | Failed]:
    """Replies to all texts, or why there is none, within the time: threads that are late are left to themselves.

    Raises:
        ConfigError: one of the calls did.
    """
    deadline = time.monotonic() + seconds
    waiting = list(range(len(texts)))[::-1]
    replies: dict[int, str | Failed] = {}
    errors: list[Exception] = []
    changed = threading.Condition()

    def serve() -> None:
        while True:
            with changed:
                if not waiting or errors or time.monotonic() >= deadline:
                    return
                place = waiting.pop()
            try:
                reply: str | Failed = ask(texts[place], deadline)
            except Exception as error:
                reply = Failed(str(error))
                errors.append(error)
            with changed:
                replies[place] = reply
                changed.notify()

    for _ in range(min(n_threads, len(texts))):
        threading.Thread(target=serve, daemon=True).start()
    with changed:
        changed.wait_for(lambda: len(replies) == len(texts) or errors, timeout=max(0.0, deadline - time.monotonic()))
        if errors:
            raise errors[0]
        late = Failed(f"no reply within {seconds:g} s for all")
        return [replies.get(place, late) for place in range(len(texts))]
