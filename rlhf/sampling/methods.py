"""How the next token is chosen from its logits.

A method is a value and its numbers are traced: one compiled program serves greedy decoding and every mixture of
temperature, top-k, top-p and min-p. Nothing sorts the vocabulary: top-k and top-p choose among the CANDIDATES most
likely tokens.
"""

from abc import abstractmethod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError

CANDIDATES = 256  # the most tokens that top-k or top-p leaves to choose from


class Drawn(NamedTuple):
    """tokens: one for each row. filtered_logprobs: of these under the distribution they were drawn from, nats."""

    tokens: Int[Array, "batch"]
    filtered_logprobs: Float[Array, "batch"]


class Method:
    """A way to choose tokens; every one is a setting of `Sample`, which is what is compiled."""

    @abstractmethod
    def as_sample(self) -> "Sample": ...


@config
class Greedy(Method):
    """Always the most likely token; of equal ones the first."""

    def as_sample(self) -> "Sample":
        return Sample(temperature=0.0)


@config
class Sample(Method):
    """Draw from softmax(logits / temperature), restricted by what is set of the others, in this order.

    temperature: 1 is the model's own distribution, 0 is greedy.
    top_k: keep the k most likely tokens, at most CANDIDATES; 0 keeps all.
    top_p: of what top_k left, keep the most likely tokens up to and with the one that brings their share to top_p
        (Holtzman et al., 2020, section 3.1). 1 keeps all; below 1 without top_k at most CANDIDATES tokens stay.
    min_p: keep tokens at least min_p times as likely as the most likely one (Nguyen et al., 2024, section 3); 0 keeps
        all.
    """

    temperature: Number = 1.0
    top_k: Number = 0.0
    top_p: Number = 1.0
    min_p: Number = 0.0

    def __post_init__(self):
        require_range(self, "temperature", at_least=0)
        require_range(self, "top_k", at_least=0, at_most=CANDIDATES)
        require_range(self, "top_p", above=0, at_most=1)
        require_range(self, "min_p", at_least=0, at_most=1)
        if isinstance(self.top_k, float | int) and self.top_k != int(self.top_k):
            raise ConfigError(f"top_k={self.top_k!r} of Sample must be a whole number")

    def as_sample(self) -> "Sample":
        return self


def draw(method: Sample, logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"]) -> Drawn:
    """One token for each row. A row's draw depends on its own logits and key only; logits of -inf are never drawn."""
    is_cut = (jnp.asarray(method.top_k) > 0) | (jnp.asarray(method.top_p) < 1)
    branch = jnp.where(jnp.asarray(method.temperature) == 0, 0, jnp.where(is_cut, 2, 1))
    return jax.lax.switch(branch, (_most_likely, _from_all, _from_candidates), method, logits, keys)


def _most_likely(method: Sample, logits: Array, keys: Array) -> Drawn:
    return Drawn(jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[0], jnp.float32))


def _from_all(method: Sample, logits: Array, keys: Array) -> Drawn:
    heights = (logits - jnp.max(logits, axis=-1, keepdims=True)) / method.temperature
    return Drawn(*_gumbel_max(jnp.where(heights >= jnp.log(method.min_p), heights, -jnp.inf), keys))


def _from_candidates(method: Sample, logits: Array, keys: Array) -> Drawn:
    # The top is not taken from the candidates: a slice of top_k's result makes XLA sort the whole vocabulary on CPU.
    top = jnp.max(logits, axis=-1, keepdims=True)
    best, ids = jax.lax.top_k(logits, min(CANDIDATES, logits.shape[-1]))
    heights = (best - top) / method.temperature
    has_top_k = jnp.asarray(method.top_k) > 0
    is_kept = (jnp.arange(heights.shape[-1]) < method.top_k) | ~has_top_k
    heights = jnp.where(is_kept[None], heights, -jnp.inf)
    # Without top-k, shares are of the whole vocabulary and not of the candidates.
    log_total = jnp.where(
        has_top_k,
        jax.nn.logsumexp(heights, axis=-1, keepdims=True),
        jax.nn.logsumexp((logits - top) / method.temperature, axis=-1, keepdims=True),
    )
    shares = jnp.exp(heights - log_total)
    share_before = jnp.cumsum(shares, axis=-1) - shares
    is_drawn = (share_before < method.top_p) & (heights >= jnp.log(method.min_p))
    ranks, logprobs = _gumbel_max(jnp.where(is_drawn, heights, -jnp.inf), keys)
    return Drawn(jnp.take_along_axis(ids, ranks[:, None], axis=-1)[:, 0], logprobs)


def _gumbel_max(heights: Array, keys: Array) -> tuple[Array, Array]:
    """Index drawn from softmax(heights) in each row, and its log-probability."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, heights.shape[-1:]))(keys)
    chosen = jnp.argmax(heights + noise, axis=-1).astype(jnp.int32)
    height = jnp.take_along_axis(heights, chosen[:, None], axis=-1)[:, 0]
    return chosen, height - jax.nn.logsumexp(heights, axis=-1)
