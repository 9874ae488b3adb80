"""Answer prompts with a checkpoint."""

import json
import logging
from pathlib import Path
from typing import Any

from rlhf.build import Experiment
from rlhf.config import config, require_range
from rlhf.data.encode import Prompt
from rlhf.data.jsonl import read_json
from rlhf.errors import ConfigError, DataError
from rlhf.model.chat import ChatTemplate, Message

log = logging.getLogger(__name__)


@config
class Generate:
    """`rlhf task=generate prompts='[How are you?]' model.checkpoint=…`.

    prompts: questions, or one file: .txt with a question a line, .jsonl with a field `prompt` (text or messages).
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
            ConfigError: no prompts. DataError: a file or row that can't be used.
        """
        conversations = self._conversations()
        settings, template = experiment.settings.evaluation, ChatTemplate(experiment.tokenizer)
        prompts = [Prompt(tuple(template.prompt(c)), None, {}, row) for row, c in enumerate(conversations)]
        sampler, parameters = experiment.sampler, experiment.parameters
        rollout = sampler(
            parameters,
            prompts,
            n=self.n,
            method=settings.method,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            stop=settings.stop,
            slots=settings.batch_size,
        )
        rows = []
        for number, answer in enumerate(rollout.completions):
            messages = [message._asdict() for message in conversations[number // rollout.n]]
            row = {"prompt": messages, "answer": answer.text, "is_truncated": answer.is_truncated}
            rows.append({**row, "finish_reason": answer.finish_reason, "n_tokens": answer.n_tokens})
            print(f"\n> {messages[-1]['content']}\n{answer.text}{' …' if answer.is_truncated else ''}")
        metrics = rollout.metrics()
        if sampler.settings.weights is not None or sampler.settings.cache_dtype is not None:
            temperature = getattr(settings.method, "temperature", 1.0) or 1.0
            metrics["sampling/logp_difference"] = sampler.difference(parameters, prompts, rollout, temperature)
        for name, value in metrics.items():
            log.info("%-28s %.4g", name, value)
        path = experiment.folder / "generations.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        log.info("%d answers written: %s", len(rows), path)
        return {"n": len(rows), "path": str(path), **metrics}

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
