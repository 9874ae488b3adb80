"""The samples shown while training: a greedy and a drawn answer to a few held-out prompts."""

from collections.abc import Sequence
from typing import Any

from rlhf.model.gemma3 import Tree
from rlhf.sampling.methods import Greedy, Method, Sample
from rlhf.sampling.sampler import Prompt, Sampler, show_prompt


def sample_rows(
    sampler: Sampler, params: Tree, prompts: Sequence[Prompt], step: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    """A greedy and a temperature-1 answer to each prompt, as rows for `samples.jsonl`.

    The noise depends on the sampler's seed, step, row and position, so a resumed run writes the same rows.
    """
    n = len(prompts)
    methods: list[Method] = [Greedy()] * n + [Sample()] * n
    rollout = sampler(params, [*prompts, *prompts], method=methods, max_new_tokens=max_new_tokens, step=step)
    return [
        {
            "step": step,
            "row": prompt.row,
            "prompt": show_prompt(sampler.tokenizer, prompt),
            "greedy": greedy,
            "sampled": sampled,
            "answer": prompt.answer,
        }
        for prompt, greedy, sampled in zip(prompts, rollout.texts[:n], rollout.texts[n:], strict=True)
    ]
