"""What a call adds to or forbids in the logits, and what is measured of each drawn token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf.sampling.draw import candidates
from rlhf.sampling.methods import Numbers

ALTERNATIVES = 20  # most likely tokens reported at each place, at most


class Rules(NamedTuple):
    """What holds for all rows of a call.

    bias: added to the logits; -inf for tokens that are never drawn. is_stop: tokens that end an answer.
    wants_entropy: whether entropies are computed.
    """

    bias: Float[Array, "vocab"]
    is_stop: Bool[Array, "vocab"]
    wants_entropy: Bool[Array, ""]


class Seen(NamedTuple):
    """The tokens that a repetition penalty counts: of each row's prompt and of its answer so far."""

    prompts: Int[Array, "entries prompt_time"]
    prompt_lengths: Int[Array, "entries"]
    answers: Int[Array, "rows time"]
    answer_lengths: Int[Array, "rows"]


def restrict(
    rules: Rules,
    numbers: Numbers,
    logits: Float[Array, "rows vocab"],
    is_too_short: Bool[Array, "rows"],
    seen: Seen,
) -> Float[Array, "rows vocab"]:
    """The logits to draw from: penalty, bias, and no end before the minimum length."""
    penalised = jax.lax.cond(
        jnp.any(numbers.repetition_penalty != 1), _penalise, lambda numbers, logits, seen: logits, numbers, logits, seen
    )
    allowed = penalised + rules.bias[None]
    return jnp.where(rules.is_stop[None] & is_too_short[:, None], -jnp.inf, allowed)


def _penalise(numbers: Numbers, logits: Array, seen: Seen) -> Array:
    vocab, rows = logits.shape[-1], jnp.arange(logits.shape[0])[:, None]
    prompts = jnp.where(_is_filled(seen.prompts, seen.prompt_lengths), seen.prompts, vocab)
    prompts = jnp.repeat(prompts, logits.shape[0] // prompts.shape[0], axis=0)
    answers = jnp.where(_is_filled(seen.answers, seen.answer_lengths), seen.answers, vocab)
    ids = jnp.concatenate([prompts, answers], axis=1)
    penalty = numbers.repetition_penalty[:, None]
    values = logits.at[rows, ids].get(mode="fill", fill_value=0)
    # A token that occurs twice is set twice, to the same value.
    return logits.at[rows, ids].set(jnp.where(values > 0, values / penalty, values * penalty), mode="drop")


def _is_filled(tokens: Array, lengths: Array) -> Array:
    return jnp.arange(tokens.shape[1])[None] < lengths[:, None]


class Scores(NamedTuple):
    """Of the unfiltered distribution at the row's temperature (1 for greedy rows), nats.

    logprobs: of the drawn token. entropies: 0 unless wanted.
    """

    logprobs: Float[Array, "rows"]
    entropies: Float[Array, "rows"]


def score(
    rules: Rules, numbers: Numbers, logits: Float[Array, "rows vocab"], tokens: Int[Array, "rows"]
) -> tuple[Scores, Float[Array, "rows"]]:
    """The scores of the drawn tokens, and the log of each row's normaliser: log-probability is logit / T - it."""
    temperature = jnp.where(numbers.temperature == 0, 1.0, numbers.temperature)
    heights = logits / temperature[:, None]
    log_totals = jax.nn.logsumexp(heights, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] / temperature

    def measure(heights, log_totals):
        logs = heights - log_totals[:, None]
        return -jnp.sum(jnp.exp(logs) * logs, axis=-1)

    nothing = lambda heights, log_totals: jnp.zeros_like(log_totals)  # noqa: E731
    entropies = jax.lax.cond(rules.wants_entropy, measure, nothing, heights, log_totals)
    return Scores(chosen - log_totals, entropies), log_totals


def alternatives(
    numbers: Numbers, logits: Float[Array, "rows vocab"], log_totals: Float[Array, "rows"]
) -> tuple[Int[Array, "rows n"], Float[Array, "rows n"]]:
    """The most likely tokens of the unfiltered distribution and their log-probabilities, most likely first."""
    temperature = jnp.where(numbers.temperature == 0, 1.0, numbers.temperature)
    values, ids = candidates(logits, min(ALTERNATIVES, logits.shape[-1]))
    return ids, values / temperature[:, None] - log_totals[:, None]
