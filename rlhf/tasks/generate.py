"""Answer prompts with a checkpoint."""

import json
import logging
from pathlib import Path
from typing import Any

import jax

from rlhf.build import Experiment
from rlhf.config import config
from rlhf.data.encode import Prompt
from rlhf.data.jsonl import read_json
from rlhf.errors import ConfigError, DataError
from rlhf.model.chat import ChatTemplate, Message
from rlhf.sampling.completions import complete

log = logging.getLogger(__name__)


@config
class Generate:
    """`rlhf task=generate prompts='[How are you?]' model.checkpoint=…`.

    prompts: questions, or one file: .txt with a question a line, .jsonl with a field `prompt` (text or messages).
    How to generate is `evaluation.method`, `evaluation.max_new_tokens` and `evaluation.seed`.
    """

    prompts: tuple[str, ...] | str

    def __call__(self, experiment: Experiment) -> dict[str, Any]:
        """Prints each answer and writes `generations.jsonl`.

        Raises:
            ConfigError: no prompts. DataError: a file or row that can't be used.
        """
        conversations = self._conversations()
        tokenizer, settings = experiment.tokenizer, experiment.settings.evaluation
        template = ChatTemplate(tokenizer)
        prompts = [Prompt(tuple(template.prompt(c)), None, {}, row) for row, c in enumerate(conversations)]
        rows = []
        for start in range(0, len(prompts), settings.batch_size):
            part = prompts[start : start + settings.batch_size]
            answers = complete(
                experiment.model,
                experiment.parameters,
                tokenizer,
                part,
                method=settings.method,
                max_new_tokens=settings.max_new_tokens,
                key=jax.random.key(settings.seed),
            )
            for prompt, answer in zip(part, answers, strict=True):
                messages = [message._asdict() for message in conversations[prompt.row]]
                rows.append({"prompt": messages, "answer": answer.text, "is_truncated": answer.is_truncated})
                print(f"\n> {messages[-1]['content']}\n{answer.text}{' …' if answer.is_truncated else ''}")
        path = experiment.folder / "generations.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        log.info("%d answers written: %s", len(rows), path)
        return {"n": len(rows), "path": str(path)}

    def _conversations(self) -> list[list[Message]]:
        texts = list(self.prompts) if isinstance(self.prompts, tuple) else self._read(Path(self.prompts))
        if not texts:
            raise ConfigError("prompts is empty: give questions, as prompts='[first,second]', or a file")
        return [[Message("user", text)] if isinstance(text, str) else text for text in texts]

    def _read(self, path: Path) -> list[Any]:
        if path.suffix not in (".txt", ".jsonl", ".json"):
            return [self.prompts]
        if not path.is_file():
            raise ConfigError(f"prompts={path}: there is no such file")
        if path.suffix == ".txt":
            return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        found = []
        for line, row in read_json(path):
            if isinstance(row, DataError):
                raise DataError(f"{path}:{line}: {row}")
            if "prompt" not in row:
                raise DataError(f"{path}:{line}: the row has no field 'prompt', it has: {', '.join(row)}")
            value = row["prompt"]
            found.append(value if isinstance(value, str) else [Message(m["role"], m["content"]) for m in value])
        return found
