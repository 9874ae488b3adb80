"""The critic of PPO: where its weights come from, how it is trained, and its values of a batch.

params["critic"] = {"model": …, "head": …}       weights of its own
params["critic"] = {"adapter": …, "head": …}     an adapter of its own on the base that it shares with the policy
"""

import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf.algorithms.base import Batch, Params
from rlhf.algorithms.reference import MODEL_INPUTS
from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError
from rlhf.model.head import draw_head, token_values
from rlhf.model.lora import merged
from rlhf.model.quantised import is_quantised
from rlhf.model.sharding import mesh_of, place_rows, whole

log = logging.getLogger(__name__)


@config
class Critic:
    """How values are learnt.

    start: a run or a checkpoint whose weights the critic begins with; of a reward model its head too. null: the
        policy's weights, and values of 0.
    weights: `own`, or `adapter`: on the base that is shared with the policy, where the policy is an adapter too (a
        start must then be one of the same shape on the same base); `auto`: adapter where that can be, else own.
    learning_rate: peak; the algorithm's schedule applies.
    warmup: optimizer steps at the start in which only the critic learns.
    loss_weight: of its loss beside the policy's.
    clip: the loss does not reward a value for moving further than this from what it was; null: no bound.
    """

    start: str | None = None
    weights: Literal["auto", "own", "adapter"] = "auto"
    learning_rate: Number = 1e-5
    warmup: int = 0
    loss_weight: Number = 0.1
    clip: Number | None = 0.2

    def __post_init__(self):
        require_range(self, "learning_rate", at_least=0)
        require_range(self, "warmup", at_least=0)
        require_range(self, "loss_weight", at_least=0)
        require_range(self, "clip", above=0, may_be_infinite=True)

    def begin(self, params: Params, load: Any, seed: int) -> Params:
        """The component `critic` of a new run.

        params: the policy's. load: as for `Algorithm.components`.

        Raises:
            ConfigError: an adapter is asked for and there is none, or a quantised base would have to be trained.
        """
        if self.start is None:
            return {**self._from_policy(params), "head": _zero_head(params)}
        loaded = load(self.start)
        head = loaded.get("head")
        log.info("critic: %s, %s", self.start, "without a head: a new one" if head is None else "a reward model")
        own = {"head": draw_head(seed, loaded["model"]["final_norm"].shape[0]) if head is None else head}
        if self.weights != "own" and "adapter" in params and "adapter" in loaded:
            return {"adapter": loaded["adapter"], **own}
        if self.weights == "adapter":
            raise ConfigError(
                f"algorithm.critic.start={self.start} holds no adapter of model.lora's shape on this run's base: "
                "algorithm.critic.weights=own gives the critic its own parameters"
            )
        return {"model": loaded["model"], **own}

    def _from_policy(self, params: Params) -> Params:
        has_adapter = "adapter" in params
        if self.weights == "adapter" and not has_adapter:
            raise ConfigError(
                "algorithm.critic.weights=adapter needs a policy that is one: set model.lora.rank, or "
                "algorithm.critic.weights=own"
            )
        if has_adapter and self.weights != "own":
            return {"adapter": params["adapter"]}
        if any(is_quantised(x) for x in jax.tree.leaves(params["model"], is_leaf=is_quantised)):
            raise ConfigError("algorithm.critic.weights=own can't train a base of model.base_quantisation: use adapter")
        if not has_adapter:
            return {"model": params["model"]}
        dtype = str(params["model"]["embedding"].dtype)
        return {"model": merged(params["model"], params["adapter"], params["adapter_scale"], dtype)}

    def __call__(self, model: Any, params: Params, batch: Batch) -> Float[Array, "rows time"]:
        """The value at every place of a batch, with a gradient to the critic alone."""
        return token_values(model, trunk_of(params), params["critic"]["head"], batch)

    def values(self, model: Any, params: Params, batch: Batch, rows: int) -> Float[np.ndarray, "rows time"]:
        """The same on the host, `rows` rows at a time, without a gradient."""
        mesh, inputs = mesh_of(params["critic"]), {name: batch[name] for name in MODEL_INPUTS if name in batch}
        starts = range(0, len(batch["tokens"]), rows)
        parts = [place_rows({name: x[at : at + rows] for name, x in inputs.items()}, mesh) for at in starts]
        needed = {name: params[name] for name in ("critic", *trunk_of(params)) if name in params}
        return np.concatenate([np.asarray(whole(_values(model, needed, part))) for part in parts])


def trunk_of(params: Params) -> Params:
    """The parameters that the critic's hidden states come from."""
    critic = params["critic"]
    shared = {name: params[name] for name in ("vision",) if name in params}
    if "adapter" not in critic:
        return {**shared, "model": critic["model"]}
    return {**shared, "model": params["model"], "adapter": critic["adapter"], "adapter_scale": params["adapter_scale"]}


@functools.partial(jax.jit, static_argnames="model")
def _values(model: Any, params: Params, batch: Batch) -> Float[Array, "rows time"]:
    return token_values(model, trunk_of(params), params["critic"]["head"], batch)


def _zero_head(params: Params) -> Params:
    width = params["model"]["final_norm"].shape[0]
    return {"weight": jnp.zeros(width), "bias": jnp.float32(0), "scale": jnp.float32(1)}
