"""Generated answers as rewards read them."""

from collections.abc import Sequence

from rlhf.model.tokenizer import Tokenizer
from rlhf.rewards.base import Answered
from rlhf.sampling.sampler import Prompt, Rollout, show_prompt


def answered(tokenizer: Tokenizer, prompts: Sequence[Prompt], rollout: Rollout) -> list[Answered]:
    """Every answer of a rollout to `prompts`, in its order: `rollout.n` to each prompt."""
    shown = [show_prompt(tokenizer, prompt) for prompt in prompts]
    tokens = rollout.generation.tokens
    return [
        Answered(
            prompt=shown[number // rollout.n],
            completion=completion.text,
            reference=prompts[number // rollout.n].answer,
            fields=prompts[number // rollout.n].fields,
            n_tokens=completion.n_tokens,
            is_truncated=completion.is_truncated,
            row=prompts[number // rollout.n].row,
            prompt_ids=tuple(prompts[number // rollout.n].token_ids),
            answer_ids=tuple(tokens[number, : completion.n_tokens].tolist()),
        )
        for number, completion in enumerate(rollout.completions)
    ]
