"""A head with one output: the score of an answer (a reward model), or a value at every place (a critic).

    params["head"] = {"weight": [width], "bias": (), "scale": ()}

A raw output is hidden · weight, in float32 whatever the rest is. `scale` and `bias` normalise it and are not learnt:
scale · raw + bias has mean 0 and standard deviation 1 over what `normalised` was given.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf.model.random_arrays import normal

Tree = dict[str, Any]


def draw_head(seed: int, width: int) -> Tree:
    """A new head: weights N(0, 1 / (width + 1)) (Stiennon et al., 2020, appendix B.1), not normalised."""
    weight = normal(seed, "head", (width,), (width + 1) ** -0.5, "float32")
    return {"weight": jnp.asarray(weight), "bias": jnp.float32(0), "scale": jnp.float32(1)}


def abstract_head(width: int) -> Tree:
    """Shapes and types of a head, without memory."""
    shapes: dict[str, tuple[int, ...]] = {"weight": (width,), "bias": (), "scale": ()}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def raw_output(head: Tree, hidden: Float[Array, "*rows width"]) -> Float[Array, "*rows"]:
    """The output that is trained, without normalisation."""
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), head["weight"])


def output(head: Tree, hidden: Float[Array, "*rows width"]) -> Float[Array, "*rows"]:
    """The normalised output; no gradient flows into what normalises it."""
    return jax.lax.stop_gradient(head["scale"]) * raw_output(head, hidden) + jax.lax.stop_gradient(head["bias"])


def normalised(head: Tree, raw: Float[np.ndarray, "n"]) -> Tree:
    """The head with the scale and bias that give these raw outputs mean 0 and standard deviation 1.

    Outputs that are all equal get mean 0 alone.
    """
    spread = float(np.std(raw, dtype=np.float64))
    scale = 1 / spread if spread > 1e-12 else 1.0
    return {**head, "scale": jnp.float32(scale), "bias": jnp.float32(-scale * np.mean(raw, dtype=np.float64))}


def last_place(is_answer: Bool[Array | np.ndarray, "*rows time"]) -> Int[Array, "*rows"]:
    """The place of each row's last answer token, whatever padding follows or precedes; 0 where there is none."""
    places = jnp.arange(is_answer.shape[-1])
    return jnp.max(jnp.where(jnp.asarray(is_answer), places, 0), axis=-1)


def last_hidden(model: Any, params: Tree, batch: Tree) -> Float[Array, "*rows width"]:
    """The hidden state at each sequence's last answer token, the stop token of a finished answer.

    batch: as for `Gemma3.token_logprobs`, with `is_answer` [..., time]; with `joint_…` the same is read from rows that
        hold a shared beginning once.
    """
    place = last_place(batch["is_answer"])
    if "joint_tokens" in batch:
        hidden = model.joint_hidden_of(params, batch)
        place = jnp.take_along_axis(jnp.asarray(batch["joint_places"]), place[..., None], axis=-1)[..., 0]
        return jnp.take_along_axis(hidden, jnp.maximum(place, 0)[..., None], axis=1)
    hidden = model.hidden_of(params, batch)
    found = jnp.take_along_axis(hidden, place.reshape(-1, 1, 1), axis=1)
    return found.reshape(*place.shape, -1)


def token_values(model: Any, params: Tree, head: Tree, batch: Tree) -> Float[Array, "rows time"]:
    """A value at every place: at t what is expected before tokens[t] is known, from the tokens before it.

    0 at a row's first place. The value of a place is aligned with the log-probability of its token.
    """
    hidden = model.hidden_of(params, batch)[:, :-1]
    return jnp.pad(output(head, hidden), ((0, 0), (1, 0)))
