"""The reward that asks a trained reward model; its weights are frozen."""

import re
from collections.abc import Sequence
from typing import Any

from rlhf.config import config, require_range
from rlhf.errors import CheckpointError, DataError
from rlhf.model.scorer import Scorer
from rlhf.model.tokenizer import Tokenizer
from rlhf.rewards.base import Answered, Failed, Judgements, OnError, Reward


@config
class RewardModel(Reward):
    """The normalised output of a run of algorithm=reward_model at the end of prompt and answer.

    checkpoint: the run. Its tokenizer and size may be others than the policy's.
    batch_size: answers scored at once.
    max_length: tokens of the longest prompt with its answer: one shape for all batches, and a longer answer can't be
        judged; null: shapes double as answers get longer, and each is compiled once.
    on_error: what a failed answer does: stop the run, or mask the answer.
    """

    checkpoint: str
    batch_size: int = 16
    max_length: int | None = None
    on_error: OnError = "stop"

    def __post_init__(self):
        require_range(self, "batch_size", at_least=1)
        require_range(self, "max_length", at_least=16)

    def __call__(self, answers: Sequence[Answered], step: int) -> Judgements:
        raise AssertionError("a reward model scores through what `connect` gives")

    def connect(self, load: Any) -> Any:
        """
        Raises:
            CheckpointError: the checkpoint is no reward model.
        """
        loaded = load(self.checkpoint)
        if "head" not in loaded.others:
            raise CheckpointError(
                f"reward.reward_model.checkpoint={self.checkpoint} is no reward model: it has no head; "
                "algorithm=reward_model trains one"
            )
        params = {**loaded.params, "head": loaded.others["head"]}
        scorer = Scorer(loaded.model, params, self.batch_size, self.max_length)

        def judge(answers: Sequence[Answered], step: int) -> Judgements:
            sequences = [token_ids(answer, loaded.tokenizer) for answer in answers]
            fits = [self.max_length is None or len(ids) <= self.max_length for ids in sequences]
            scores = iter(scorer([ids for ids, fit in zip(sequences, fits, strict=True) if fit]).tolist())
            return [next(scores) if fit else self._too_long(ids) for ids, fit in zip(sequences, fits, strict=True)]

        return judge

    def _too_long(self, ids: Sequence[int]) -> Failed:
        return Failed(f"{len(ids)} tokens, more than reward.reward_model.max_length={self.max_length}")


def token_ids(answer: Answered, tokenizer: Tokenizer) -> list[int]:
    """Prompt and answer in a tokenizer's ids, as its model was trained on them; a finished answer ends with the stop
    token.

    The policy's own ids are taken where this tokenizer reads them as the same text, else the text is encoded.

    Raises:
        DataError: the prompt shows an image.
    """
    if "<start_of_image>" in answer.prompt:
        raise DataError("reward reward_model reads text only, and the prompt shows an image")
    if answer.prompt_ids and tokenizer.decode(answer.prompt_ids, show_control=True) == answer.prompt:
        answered = list(answer.answer_ids)
        if tokenizer.decode(answered) == answer.completion:
            return [*answer.prompt_ids, *_closed(answered, answer, tokenizer)]
    return [*_prompt_ids(answer.prompt, tokenizer), *_closed(tokenizer.encode(answer.completion), answer, tokenizer)]


def _closed(answered: list[int], answer: Answered, tokenizer: Tokenizer) -> list[int]:
    """The answer with the end that a conversation has: whatever stopped it, a finished turn."""
    while answered and answered[-1] in tokenizer.stop_ids:
        answered = answered[:-1]
    return answered if answer.is_truncated else [*answered, tokenizer.end_of_turn]


def _prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """A prompt in which control tokens are spelt out, as ids."""
    control = {
        tokenizer.piece(index): index for index in (tokenizer.bos, tokenizer.start_of_turn, tokenizer.end_of_turn)
    }
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, control))})", prompt):
        ids += [control[part]] if part in control else _text_ids(part, tokenizer)
    return ids


def _text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """What stands between control tokens; the head of an answer is encoded apart from it, as in the template."""
    parts = ("model\n", text.removeprefix("model\n")) if text.startswith("model\n") else (text,)
    return [index for part in parts if part for index in tokenizer.encode(part)]
