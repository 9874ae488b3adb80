"""What runs in a worker process: one function, called again and again with what comes in over a pipe.

Imports nothing but the standard library, so that a worker starts quickly and holds no accelerator. In: a length (8
bytes) and a pickle, from our own process. Out: one line of JSON each, never a pickle: what comes out is not trusted.
"""

import importlib
import inspect
import json
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.rewards.numbers import as_score

_SPARE_SECONDS = 5.0  # after the limit, a worker whose parent did not end it (it is gone) ends by itself
_LONGEST = 500  # characters of a reason


def main() -> None:
    """Serve until the pipe is closed."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what the function prints goes to the terminal, not into the replies
    begin = _read(requests)
    try:
        if begin["memory_bytes"] is not None:
            import resource  # not on every system

            resource.setrlimit(resource.RLIMIT_AS, (begin["memory_bytes"], begin["memory_bytes"]))
        function = find(begin["path"], begin["parameters"])
    except BaseException as error:
        _write(replies, {"error": told(error)})
        return
    _write(replies, {"ready": True})
    while (request := _read(requests)) is not None:
        signal.setitimer(signal.ITIMER_REAL, request["limit_seconds"] + _SPARE_SECONDS)
        reply = answer(function, request["arguments"], request["n"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(replies, reply)


def answer(function: Callable, arguments: tuple, n: int) -> dict[str, Any]:
    """The scores that the function gives, each as a number or a text that says what is wrong with it."""
    try:
        found = function(*arguments)
        if isinstance(found, str | bytes | dict) or not hasattr(found, "__len__"):
            return {"error": f"it returned {type(found).__name__}, not a list of {n} numbers"}
        if len(found) != n:
            return {"error": f"it returned {len(found)} scores for {n} answers"}
        return {"scores": [_checked(value) for value in found]}
    except BaseException as error:  # a SystemExit is no reason to end either
        return {"error": told(error)}


def _checked(value: Any) -> float | str:
    if isinstance(value, dict) and set(value) == {"failed"}:  # our own functions say so of one answer
        return str(value["failed"])[:_LONGEST]
    found = as_score(value)
    return f"its score {found}" if isinstance(found, str) else found


def find(path: str, parameters: Sequence[str]) -> Callable:
    """The callable at an import path, `package.module.function` or `package.module:function`.

    Raises:
        ValueError: it is no such path, or what is there can't be called with such parameters, by position.
        ImportError: the module can't be imported.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module:
        raise ValueError(f"{path!r} is no import path of a function, such as my_module.my_function")
    found = getattr(importlib.import_module(module), name, None)
    if not callable(found):
        raise ValueError(f"there is no function {name!r} in the module {module}")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # some that are not written in Python have none
        return found
    try:
        signature.bind(*parameters)
    except TypeError as error:
        call = f"{name}({', '.join(parameters)})"
        raise ValueError(f"it is called as {call}, and is written as {name}{signature}: {error}") from None
    return found


def told(error: BaseException) -> str:
    """The error in a line, with the place in the code that raised it."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if os.path.abspath(file) != os.path.abspath(__file__) and not file.startswith("<"):
            place = f" ({os.path.basename(file)}, line {line})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}"[:_LONGEST] + place


def _read(requests: Any) -> Any:
    head = requests.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "big")
    body = requests.read(size)
    return pickle.loads(body) if len(body) == size else None


def _write(replies: Any, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()
