"""Answer prompts with a checkpoint."""

import codecs
import json
import logging
import sys
from pathlib import Path
from typing import Any

from rlhf.build import Experiment
from rlhf.config import config, require_range
from rlhf.data.encode import Prompt
from rlhf.data.examples import Messages, check, prompt_of
from rlhf.data.images import describe
from rlhf.data.jsonl import read_json, text_of
from rlhf.data.pictures import Viewing, images_of_row, with_pictures
from rlhf.data.rows import Questions
from rlhf.errors import ConfigError, DataError
from rlhf.model.chat import ChatTemplate, Message
from rlhf.model.vision import Vision

log = logging.getLogger(__name__)


@config
class Generate:
    """`rlhf task=generate prompts='[How are you?]' model.checkpoint=…`.

    prompts: questions, or one file: .txt with a question a line, .jsonl with a field `prompt` (text or messages). For a
        model that sees, messages may hold images, or a field `image` or `images` stand beside them.
    n: answers to each.
    How to generate is `evaluation.method`, `max_new_tokens`, `seed`, `stop`; with `sampling.weights` or
    `sampling.cache_dtype`, how far log-probabilities are from the trainer's is measured.
    """

    prompts: tuple[str, ...] | str
    n: int = 1

    def __post_init__(self):
        require_range(self, "n", at_least=1)

    def __call__(self, experiment: Experiment) -> dict[str, Any]:
        """Prints each answer and writes `generations.jsonl`.

        Raises:
            ConfigError: no prompts, or several answers by a method that does not draw. DataError: a file or row that
                can't be used.
        """
        settings = experiment.settings.evaluation
        settings.require_several(self.n, f"task.n={self.n}")
        prompts, shown = self._prompts(experiment)
        sampler, parameters = experiment.sampler, experiment.parameters
        rollout = settings.answers(sampler, parameters, prompts, self.n)
        rows = []
        for number, answer in enumerate(rollout.completions):
            messages = shown[number // rollout.n]
            row = {"prompt": messages, "answer": answer.text, "is_truncated": answer.is_truncated}
            rows.append({**row, "finish_reason": answer.finish_reason, "n_tokens": answer.n_tokens})
            print(f"\n> {messages[-1]['content']}\n{answer.text}{' …' if answer.is_truncated else ''}")
        metrics = rollout.metrics()
        if sampler.settings.weights is not None or sampler.settings.cache_dtype is not None:
            temperature = getattr(settings.drawn_by, "temperature", 1.0) or 1.0
            metrics["sampling/logp_difference"] = sampler.difference(parameters, prompts, rollout, temperature)
        for name, value in metrics.items():
            log.info("%-28s %.4g", name, value)
        path = experiment.folder / "generations.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        log.info("%d answers written: %s", len(rows), path)
        return {"n": len(rows), "path": str(path), **metrics}

    def _prompts(self, experiment: Experiment) -> tuple[list[Prompt], list[list[dict[str, Any]]]]:
        """The prompts in tokens, and the messages of each as `generations.jsonl` has them."""
        vision = experiment.model.architecture.vision
        conversations = self._conversations(vision)
        template = ChatTemplate(experiment.tokenizer, vision.tokens_per_image if vision else 0)
        rendered = template.render(conversations, opens_answer=True)
        prompts = [
            Prompt(tuple(one.tokens), None, {}, row, tuple(one.soft_tokens), one.images)
            for row, one in enumerate(rendered)
        ]
        return prompts, [[_shown(message) for message in conversation] for conversation in conversations]

    def _conversations(self, vision: Vision | None) -> list[Messages]:
        path = None if isinstance(self.prompts, tuple) else Path(self.prompts)
        if path is None or path.suffix not in (".txt", ".jsonl", ".json"):
            texts = list(self.prompts) if isinstance(self.prompts, tuple) else [self.prompts]
        elif not path.is_file():
            raise ConfigError(f"prompts={path}: there is no such file")
        elif path.suffix == ".txt":
            texts = _lines(path)
        else:
            return [_of_row(path, line, row, vision) for line, row in read_json(path)]
        if not texts:
            raise ConfigError("prompts is empty: give questions, as prompts='[first,second]', or a file")
        return [(Message("user", text),) for text in texts]


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        DataError: a line is not UTF-8.
    """
    texts = []
    # at line ends only: bytes have no others, such as U+2028
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        try:
            texts.append(text_of(line))
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
    return [text for text in texts if text.strip()]


def _of_row(path: Path, line: int, row: Any, vision: Vision | None) -> Messages:
    """The messages of a row of a file, with its pictures.

    Raises:
        DataError: the row can't be used; names its line.
    """
    try:
        if isinstance(row, DataError):
            raise row
        viewing = Viewing(vision, sys.maxsize)
        read = Questions(question="prompt")
        example = with_pictures(read(row), images_of_row(row, None), viewing, path.parent, f"{path}:{line}")
        check(example)
    except DataError as error:
        raise DataError(f"{path}:{line}: {error}") from None
    return prompt_of(example)


def _shown(message: Message) -> dict[str, Any]:
    images = [describe(placed.image.source) for placed in message.images]
    return {"role": message.role, "content": message.content} | ({"images": images} if images else {})
