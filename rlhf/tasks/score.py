"""Score texts with a reward model."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.build import Experiment
from rlhf.config import config, require_range
from rlhf.data.examples import Conversation, Preference, check
from rlhf.data.rows import Conversations, Preferences, read_prompt, take
from rlhf.data.sources import RawRow, find_files, read_files
from rlhf.errors import ConfigError, DataError
from rlhf.model.chat import ChatTemplate, Message
from rlhf.model.scorer import Scorer
from rlhf.sampling.intervals import interval

log = logging.getLogger(__name__)

Texts = dict[str, list[int]]  # the token ids of what a row has scored, by the name of the score


@config
class Score:
    """`rlhf task=score file=ANSWERS.jsonl model.checkpoint=RUN`.

    file: json, jsonl, parquet, a folder or pattern of them, or txt with a text a line.
    messages, prompt, answer, chosen, rejected, text: columns. A row is a conversation (`messages`), a question with its
        answer, two answers (whole dialogues, or with `prompt`), or a text that is scored as it is.
    batch_size: rows scored at once. max_length: tokens of the longest row.

    Writes `scores.jsonl` into the run's folder: for each row its place and `score` (`chosen` and `rejected` of two
    answers), at the last token of the last answer.
    """

    file: str
    messages: str = "messages"
    prompt: str = "prompt"
    answer: str = "completion"
    chosen: str = "chosen"
    rejected: str = "rejected"
    text: str = "text"
    batch_size: int = 32
    max_length: int = 2048

    def __post_init__(self):
        require_range(self, "batch_size", at_least=1)
        require_range(self, "max_length", at_least=1)

    def __call__(self, experiment: Experiment) -> dict[str, Any]:
        """Mean, deviation and extremes of the scores; of two answers also how often the chosen one is ahead.

        Raises:
            ConfigError: model.checkpoint is no reward model. DataError: a file or a row that can't be used.
        """
        parameters = experiment.parameters
        if "head" not in parameters:
            raise ConfigError(
                "task=score needs model.checkpoint=…, the run of a reward model (algorithm=reward_model): "
                f"{experiment.settings.model.checkpoint} has no head"
            )
        template = ChatTemplate(experiment.tokenizer)
        rows = [(raw.place, self._texts_of(raw, template)) for raw in self._raw_rows()]
        scorer = Scorer(experiment.model, parameters, self.batch_size)
        found = iter(scorer([ids for _, texts in rows for ids in texts.values()]).tolist())
        scored = [{"place": place, **{name: next(found) for name in texts}} for place, texts in rows]
        path = experiment.folder / "scores.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in scored)
        summary = _summary(scored)
        for name, value in summary.items():
            log.info("%-20s %.4g", name, value)
        log.info("%d rows scored: %s", len(scored), path)
        return {**summary, "path": str(path)}

    def _raw_rows(self) -> Iterator[RawRow]:
        path = Path(self.file).expanduser()
        if path.suffix != ".txt":
            yield from read_files(find_files(self.file, "train", "file"))
        elif path.is_file():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if line.strip():
                    yield RawRow(f"{path}:{number}", {self.text: line})
        else:
            raise DataError(f"file={self.file}: there is no such file")

    def _texts_of(self, raw: RawRow, template: ChatTemplate) -> Texts:
        """What a row has scored.

        Raises:
            DataError: names the row and the reason.
        """
        try:
            if raw.fields is None:
                raise DataError(raw.problem)
            texts = self._read(raw.fields, template)
            longest = max(map(len, texts.values()))
            if longest > self.max_length:
                raise DataError(f"{longest} tokens, more than task.max_length={self.max_length}")
        except DataError as error:
            raise DataError(f"{raw.place}: {error}") from None
        return texts

    def _read(self, fields: Mapping[str, Any], template: ChatTemplate) -> Texts:
        if fields.get(self.messages) is not None:
            return {"score": _ids(Conversations(messages=self.messages)(fields), template)}
        has_prompt = fields.get(self.prompt) is not None
        if fields.get(self.chosen) is not None:
            form = Preferences(chosen=self.chosen, rejected=self.rejected, prompt=self.prompt if has_prompt else None)
            pair: Any = form(fields)
            check(pair)
            return {side: _ids(_answered(pair, side), template) for side in ("chosen", "rejected")}
        if has_prompt:
            prompt = read_prompt(fields[self.prompt], self.prompt, "role", "content")
            answer = take(fields, self.answer)
            if not isinstance(answer, str):
                raise DataError(f"column {self.answer!r} must be text, not {type(answer).__name__}")
            return {"score": _ids(Conversation((*prompt, Message("assistant", answer))), template)}
        text = fields.get(self.text)
        if not isinstance(text, str) or not text.strip():
            known = f"{self.messages}; {self.prompt} and {self.answer}; {self.chosen} and {self.rejected}; {self.text}"
            raise DataError(f"nothing to score: there are columns {', '.join(map(str, fields))}, known are {known}")
        return {"score": [template.tokenizer.bos, *template.tokenizer.encode(text)]}


def _answered(pair: Preference, side: str) -> Conversation:
    return Conversation((*pair.prompt, Message("assistant", getattr(pair, side))))


def _ids(conversation: Any, template: ChatTemplate) -> list[int]:
    """A conversation in tokens, up to the stop token of its last answer."""
    check(conversation)
    if any(message.images for message in conversation.messages):
        raise DataError("the row has an image: a reward model reads text only here")
    rendered = template.conversation(conversation.messages)
    end = int(np.flatnonzero(np.array(rendered.answer))[-1]) + 1
    return rendered.tokens[:end]


def _summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    scores = np.array([value for row in rows for name, value in row.items() if name != "place"])
    summary = {
        "n": float(len(scores)),
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "min": float(scores.min()),
        "max": float(scores.max()),
    }
    margins = np.array([row["chosen"] - row["rejected"] for row in rows if "chosen" in row])
    if margins.size:
        wins = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
        low, high = interval(wins, len(margins))
        summary |= {"accuracy": wins / len(margins), "accuracy_low": low, "accuracy_high": high}
    return summary
