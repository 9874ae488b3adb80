"""Talk with a checkpoint, in a terminal or through a pipe."""

import json
import logging
import shlex
import sys
from collections.abc import Iterator
from io import TextIOBase
from pathlib import Path
from typing import Any

from rlhf.build import Experiment
from rlhf.config import config, require_range
from rlhf.data.images import Picture, inspect
from rlhf.errors import ConfigError, DataError
from rlhf.sampling.chat import Chat as Conversation
from rlhf.sampling.methods import Beam, Method, Sample
from rlhf.sampling.presets import PRESETS, Preset

log = logging.getLogger(__name__)

_HELP = """\
/image PATH   show a picture with the next turn      /reset   forget what was said
/help         this                                   /quit    leave (so does the end of the input)"""


@config
class Chat:
    """`rlhf task=chat model.checkpoint=…`: a line is a turn; the answer is printed as it is drawn.

    method: how tokens are chosen; beam search can't, for it knows an answer only at its end.
    max_new_tokens: of an answer.
    system: said before the first turn; empty for nothing.
    room: tokens of a conversation that the first programs are compiled for; a longer one is compiled for once more.
    Where answers end besides, and the seed of the noise, are `evaluation.stop` and `evaluation.seed`.
    """

    method: Method | Preset = Sample()
    max_new_tokens: int = 512
    system: str = ""
    room: int = 1024

    def __post_init__(self):
        require_range(self, "max_new_tokens", at_least=1)
        require_range(self, "room", at_least=1)
        if isinstance(self.drawn_by, Beam):
            raise ConfigError("task.method=Beam knows an answer only at its end: chat with Greedy or Sample")

    @property
    def drawn_by(self) -> Method:
        """The method, also where it is given by name."""
        return PRESETS[self.method] if isinstance(self.method, str) else self.method

    def __call__(self, experiment: Experiment) -> dict[str, Any]:
        """Reads standard input to its end; every turn is also written to `chat.jsonl`."""
        evaluation = experiment.settings.evaluation
        conversation = Conversation(
            experiment.sampler,
            experiment.parameters,
            method=self.drawn_by,
            max_new_tokens=self.max_new_tokens,
            seed=evaluation.seed,
            stop=evaluation.stop,
            system=self.system,
            room=self.room,
        )
        n_tokens, n_turns, seconds = 0, 0, 0.0
        path = experiment.folder / "chat.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for answer in _turns(conversation, sys.stdin):  # type: ignore[arg-type]  # typeshed has no common class
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                file.flush()
                n_turns, n_tokens = n_turns + 1, n_tokens + answer["n_tokens"]
                seconds += conversation.seconds
        log.info("%d turns written: %s", n_turns, path)
        rate = {"tokens_per_second": n_tokens / seconds} if seconds else {}
        return {"n": n_turns, "n_tokens": n_tokens, "path": str(path), **rate}


def _turns(conversation: Conversation, lines: TextIOBase) -> Iterator[dict[str, Any]]:
    """Answers each line, printing as it goes; one row for each turn."""
    waiting: list[Picture] = []
    is_terminal = lines.isatty()
    if is_terminal:
        print(_HELP)
    for line in _lines(lines, is_terminal):
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/image":
            waiting += _picture(conversation, rest)
        elif command == "/reset":
            conversation.reset()
            waiting = []
            print("(begun again)", flush=True)
        elif command == "/help":
            print(_HELP, flush=True)
        elif line.startswith("/"):
            print(f"error: there is no {command}; a turn can't begin with a slash\n{_HELP}", flush=True)
        elif line and _answer(conversation, line, waiting, is_terminal):
            told = conversation.last
            assert told is not None
            shown = [str(picture.source) for picture in waiting]
            waiting = []
            yield {
                "user": line,
                "images": shown,
                "answer": told.text,
                "finish_reason": told.finish_reason,
                "n_tokens": told.n_tokens,
                "n_run": conversation.n_run,
            }


def _lines(lines: TextIOBase, is_terminal: bool) -> Iterator[str]:
    while True:
        if is_terminal:
            print("> ", end="", flush=True)
        line = lines.readline()
        if not line:
            return
        yield line.strip()


def _picture(conversation: Conversation, text: str) -> list[Picture]:
    """The picture of a path, or none with the reason printed."""
    try:
        if conversation.vision is None:
            raise DataError("the model reads text only")
        words = shlex.split(text)
        if len(words) != 1:
            raise DataError("give one path: /image PATH")
        path = Path(words[0]).expanduser()
        digest, (width, height) = inspect(path, f"image {path}")
    except (DataError, ValueError) as error:
        print(f"error: {error}", flush=True)
        return []
    print(f"(image of {width} × {height} pixels, shown with your next turn)", flush=True)
    return [Picture(path, "/image", digest)]


def _answer(conversation: Conversation, text: str, pictures: list[Picture], is_terminal: bool) -> bool:
    """Prints the answer as it comes; False if there is none, with the reason printed."""
    if not is_terminal:
        print(f"> {text}", flush=True)
    try:
        for piece in conversation.say(text, pictures):
            print(piece, end="", flush=True)
    except DataError as error:
        print(f"error: {error}", flush=True)
        return False
    except KeyboardInterrupt:  # ends the answer, not the conversation
        print(" …", flush=True)
        return conversation.last is not None
    told = conversation.last
    print(" …" if told is not None and told.is_truncated else "", flush=True)
    return True
