"""Where the reference's log-probabilities come from, as values of an algorithm's field `reference`.

Frozen weights, a reference that follows the policy, log-probabilities from a file, or none.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf import processes
from rlhf.algorithms.base import Batch, Params, Runtime
from rlhf.algorithms.reference_cache import CachedReference, cache_file, make_folder, precompute
from rlhf.config import Number, config, require_range
from rlhf.model.lora import COMPONENTS
from rlhf.model.sharding import whole

# what a text model reads of a batch, where it is there
MODEL_INPUTS = (
    *("tokens", "segments", "positions", "scored", "soft_tokens", "images"),
    *(f"joint_{name}" for name in ("tokens", "segments", "positions", "prefixes", "previous", "places", "soft_tokens")),
)


@functools.partial(jax.jit, static_argnames=("model", "with_entropy"))
def _scores(
    model: Any, params: Params, inputs: Batch, temperature: Number, with_entropy: bool
) -> tuple[Float[Array, "..."], ...]:
    """Log-probabilities first. Entropies are results too: the compiler drops what nobody asks for, and then sums the
    rest in another order than a loss that does."""
    if with_entropy:
        return model.token_statistics(params, inputs, temperature)[:2]
    return (model.token_logprobs(params, inputs, temperature),)


class Remembered:
    """Log-probabilities of batches that come again: the held-out one, and all in the further runs of a sweep.

    Whole batches, not rows: the same batch in the same slices has the same numbers to the last bit.

    limit: bytes; what would go beyond it is not kept.
    """

    def __init__(self, limit: int = 256 * 2**20):
        self.limit = limit
        self._known: dict[bytes, Array] = {}
        self._n_bytes = 0

    def get(self, inputs: Batch, temperature: Number, score: Callable[[], Array]) -> Array:
        """The log-probabilities of these inputs, from `score` if they are new."""
        digest = hashlib.blake2b(str(float(temperature)).encode())
        for name in sorted(inputs):
            digest.update(name.encode() + np.asarray(inputs[name]).tobytes())
        key = digest.digest()
        if key in self._known:
            return self._known[key]
        scored = score()
        if self._n_bytes + scored.nbytes <= self.limit:
            self._known[key], self._n_bytes = scored, self._n_bytes + scored.nbytes
        return scored


@dataclasses.dataclass(frozen=True)
class LiveReference:
    """A model with weights; no gradient flows into it.

    model: hashable; `token_logprobs(params, batch)`.
    params: the weights. Under LoRA the policy's base, the very arrays: no second copy of it exists.
    rows: rows scored at once, so that memory does not grow with the batch (the algorithm's microbatch_size).
    place: puts the inputs of such a slice onto the devices; by default they go where JAX puts them.
    remembered: what these weights gave before, where batches come again.
    with_entropy: scored by the function that gives entropies too, whose last bits differ: where the loss does so.
    """

    model: Any
    params: Params
    rows: int
    place: Callable[[Batch], Batch] = lambda inputs: inputs
    remembered: Remembered | None = None
    with_entropy: bool = False

    def with_params(self, params: Params) -> "LiveReference":
        """The same model, slicing and placement with other weights, such as the policy's of this moment."""
        return dataclasses.replace(self, params=params, remembered=None)

    def with_rows(self, rows: int) -> "LiveReference":
        """The same, with so many rows scored at once."""
        return dataclasses.replace(self, rows=rows)

    def token_logprobs(self, batch: Batch, temperature: Number = 1.0) -> Float[Array, "..."]:
        """Log-probability of each token given those before it, in nats; same shape as `batch["tokens"]`.

        temperature: what logits are divided by; that of the rollout, where the tokens come from one.
        """
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        if self.remembered is None:
            return self._scored(inputs, temperature)
        return self.remembered.get(inputs, temperature, lambda: self._scored(inputs, temperature))

    def _scored(self, inputs: Batch, temperature: Number) -> Float[Array, "..."]:
        n_rows, by = inputs["tokens"].shape[0], jnp.float32(temperature)
        slices = [{k: v[at : at + self.rows] for k, v in inputs.items()} for at in range(0, n_rows, self.rows)]
        score = functools.partial(_scores, self.model, self.params)
        scored = [whole(score(self.place(part), by, self.with_entropy)[0]) for part in slices]
        return scored[0] if len(scored) == 1 else jnp.concatenate(scored)


def without_adapter(params: Params) -> Params:
    """The base: all components but those of an adapter."""
    return {name: tree for name, tree in params.items() if name not in COMPONENTS}


class Reference:
    """Where reference log-probabilities come from."""

    @property
    def is_used(self) -> bool:
        """Whether there is a reference at all."""
        return True

    def provide(
        self, live: LiveReference, batches: Callable[[], Iterable[Batch]], key: Mapping[str, str]
    ) -> LiveReference | CachedReference:
        """What `Runtime.reference` should be, given the reference's weights; called once, before training.

        batches: gives every batch that will be asked for, once (any order, evaluation too); read only if needed.
        key: what the log-probabilities depend on, as text by name (model, data, template).
        """
        return live

    def scorer(self, runtime: Runtime, params: Params) -> Any:
        """What scores this batch: its `token_logprobs(batch)` are the reference's. Called once a batch.

        params: the policy's of this moment.
        """
        return runtime.reference


@config
class Frozen(Reference):
    """The weights that training started from; under LoRA, the base with the adapter off, or with the one that training
    goes on with as it was then."""


@config
class NoReference(Reference):
    """No reference: log-ratios are plain log-probabilities, as if the reference found every answer equally probable."""

    @property
    def is_used(self):
        return False


@functools.partial(jax.jit, static_argnames="names")
def _mixed(names: tuple[str, ...], moving: Params, params: Params, mixup: Number) -> Params:
    def mix(old, new):
        return (mixup * new + (1 - mixup) * old).astype(old.dtype)

    return {name: jax.tree.map(mix, moving[name], params[name]) for name in names}


@config
class Synced(Reference):
    """A reference that follows the policy: trust-region DPO (Gorbatovski et al., 2024, eq. 8 and 9).

    Its weights are in `Runtime.memory["reference"]`, so a resumed run goes on with the same ones. They start as the
    policy's; under LoRA only the adapter is kept twice.

    every: prepared batches between two syncs.
    mixup: weight of the policy in a sync: 1 replaces the reference, less moves it there (alpha in the paper).
    """

    every: int = 512
    mixup: Number = 0.6

    def __post_init__(self):
        require_range(self, "every", at_least=1)
        require_range(self, "mixup", above=0, at_most=1)

    def scorer(self, runtime, params):
        names = ("adapter",) if "adapter" in params else tuple(params)
        memory = runtime.memory  # keys are set anew, never changed in place: a shallow copy of it is a snapshot
        n_batches = int(memory.get("reference_batches", 0))
        if n_batches == 0:
            memory["reference"] = jax.tree.map(jnp.copy, {name: params[name] for name in names})  # params are donated
        elif n_batches % self.every == 0:
            memory["reference"] = _mixed(names, memory["reference"], params, self.mixup)
        memory["reference_batches"] = np.asarray(n_batches + 1)
        return runtime.reference.with_params({**params, **memory["reference"]})


@config
class Precomputed(Reference):
    """Log-probabilities computed once for the whole data set and kept on disk; the reference's weights are then let go.

    cache_dir: folder of the files, one for each model, data set, held-out set and chat template; made if missing.

    Raises:
        ConfigError: by `provide`, before anything is scored, where the folder can't be made.
    """

    cache_dir: str | Path

    def provide(self, live, batches, key):
        path = cache_file(Path(self.cache_dir), key)
        if processes.is_first():
            make_folder(path.parent)
        if not path.exists():
            precompute(live, batches(), path, key)
        processes.from_first(lambda: None)  # by now the first has written it
        return CachedReference.load(path, key, live, sample=next(iter(batches())))
