"""The answers to one prompt in one row, so that the prompt is run once for all of them (see `rlhf.data.joint`).

Rows of the batch are then groups: arrays are [groups, answers, time] where they were [rows, time], and losses, which
sum over the last axis and take means over all others, stay as they are.
"""

import logging
from collections.abc import Callable

import numpy as np

from rlhf.algorithms.base import Batch, Runtime
from rlhf.algorithms.rollouts import Online, Rollouts, longest_prompt, rounded
from rlhf.data.joint import WORTH, join_continuations

log = logging.getLogger(__name__)


def rows_of(runtime: Runtime, rollouts: Rollouts, algorithm: Online) -> Callable[[Batch], Batch]:
    """What puts arrays of `as_batch`, one row an answer, into the rows that the model is to run."""
    longest = max(longest_prompt(runtime), max(len(prompt.token_ids) for prompt in rollouts.prompts))
    apart = rounded(longest + algorithm.max_new_tokens)
    n, n_joint = _answers_in_a_row(runtime, algorithm, longest, apart)
    if n == 1:
        return lambda batch: batch
    leaders = range(0, len(rollouts), n)
    prompts = [rollouts.prompts[row] for row in leaders]
    answers = [[rollouts.tokens[row, : rollouts.n_tokens[row]] for row in range(at, at + n)] for at in leaders]
    soft_tokens = [prompt.soft_tokens for prompt in prompts] if runtime.prompts.n_slots else None
    ids, pad = [prompt.token_ids for prompt in prompts], runtime.prompts.pad
    joint = join_continuations(ids, answers, n, n_joint, apart, len(prompts), pad, soft_tokens)

    def in_rows(batch: Batch) -> Batch:
        grouped = {name: np.reshape(x, (-1, n, *np.shape(x)[1:])) for name, x in batch.items() if name != "images"}
        return grouped | joint | ({"images": batch["images"][::n]} if "images" in batch else {})

    return in_rows


def _answers_in_a_row(runtime: Runtime, algorithm: Online, longest: int, apart: int) -> tuple[int, int]:
    """All that a prompt has, where that saves tokens and whole groups fill every microbatch, else 1; and the row's
    tokens."""
    n = algorithm.group_size
    together = rounded(longest + n * algorithm.max_new_tokens)
    n_groups, rest = divmod(algorithm.microbatch_size, n)
    if n == 1 or rest or n_groups % runtime.n_row_shards or together > WORTH * n * apart:
        return 1, apart
    if runtime.step == 0:
        log.info("the %d answers to a prompt are one row of %d tokens instead of %d", n, together, n * apart)
    return n, together
