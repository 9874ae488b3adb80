"""Optimizers and learning-rate schedules as values; optax does the work.

Their numbers may be traced, so a sweep over them compiles once. `transform(learning_rate)` is called inside the
compiled step; the state it builds has the same structure for every learning rate.
"""

from abc import abstractmethod
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf.config import Number, config, require_range


class Optimizer:
    """What the trainer needs of an optimizer; `learning_rate` is already the value of this step."""

    @abstractmethod
    def transform(self, learning_rate: Number) -> optax.GradientTransformation: ...

    def step(self, gradient: Any, state: Any, params: Any, is_finite: Bool[Array, ""]) -> tuple[Any, Any]:
        """(changes for a learning rate of 1, new state); the state as it was where the gradient is not finite."""
        changes, new = self.transform(1.0).update(gradient, state, params)
        return changes, jax.tree.map(partial(jnp.where, is_finite), new, state)


def decays(params) -> object:
    """Which leaves get weight decay: matrices do, norm scales and biases do not (their names say so)."""

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return not any(part.endswith(("norm", "bias", "scale")) for part in name.split("/"))

    return jax.tree_util.tree_map_with_path(of, params)


@config
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019, algorithm 2)."""

    b1: Number = 0.9
    b2: Number = 0.95
    eps: Number = 1e-8
    weight_decay: Number = 0.0

    def __post_init__(self):
        require_range(self, "b1", at_least=0, at_most=1)
        require_range(self, "b2", at_least=0, at_most=1)
        require_range(self, "eps", above=0)
        require_range(self, "weight_decay", at_least=0)

    def transform(self, learning_rate: Number) -> optax.GradientTransformation:
        return optax.adamw(learning_rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=decays)

    def step(self, gradient, state, params, is_finite):
        """The changes come from the moments that are kept: from others, before the choice, XLA would have to copy
        both moments of all parameters, since it could not update them in place."""
        first, rest = state[0], state[1:]
        keep = partial(jax.tree.map, partial(jnp.where, is_finite))
        count = keep(optax.safe_increment(first.count), first.count)
        mu = keep(optax.tree.update_moment(gradient, first.mu, self.b1, 1), first.mu)
        nu = keep(optax.tree.update_moment_per_elem_norm(gradient, first.nu, self.b2, 2), first.nu)
        n = jnp.maximum(count, 1)
        mean, square = optax.tree.bias_correction(mu, self.b1, n), optax.tree.bias_correction(nu, self.b2, n)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + self.eps), mean, square)
        last = optax.chain(optax.add_decayed_weights(self.weight_decay, mask=decays), optax.scale_by_learning_rate(1.0))
        changes, rest = last.update(scaled, rest, params)
        return changes, (first._replace(count=count, mu=mu, nu=nu), *rest)


@config
class RMSProp(Optimizer):
    """RMSprop without momentum: one moment a parameter (Hinton, 2012), the optimizer of the DPO paper."""

    decay: Number = 0.99
    eps: Number = 1e-8
    weight_decay: Number = 0.0

    def __post_init__(self):
        require_range(self, "decay", at_least=0, at_most=1)
        require_range(self, "eps", above=0)
        require_range(self, "weight_decay", at_least=0)

    def transform(self, learning_rate: Number) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_rms(self.decay, self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=decays),
            optax.scale_by_learning_rate(learning_rate),
        )


@config
class Lion(Optimizer):
    """Lion: the sign of an interpolated momentum (Chen et al., 2023, algorithm 2); half of Adam's state."""

    b1: Number = 0.9
    b2: Number = 0.99
    weight_decay: Number = 0.0

    def __post_init__(self):
        require_range(self, "b1", at_least=0, at_most=1)
        require_range(self, "b2", at_least=0, at_most=1)
        require_range(self, "weight_decay", at_least=0)

    def transform(self, learning_rate: Number) -> optax.GradientTransformation:
        return optax.lion(learning_rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=decays)


@config
class Adafactor(Optimizer):
    """Adafactor without relative steps (Shazeer and Stern, 2018): rows and columns of the second moment only."""

    decay: Number = 0.8
    weight_decay: Number = 0.0

    def __post_init__(self):
        require_range(self, "decay", at_least=0, at_most=1)
        require_range(self, "weight_decay", at_least=0)

    def transform(self, learning_rate: Number) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=self.decay),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(self.weight_decay, mask=decays),
            optax.scale_by_learning_rate(learning_rate),
        )


class Schedule:
    """The learning rate as a share of its peak."""

    @abstractmethod
    def __call__(self, step: Int[Array, ""], n_steps: Int[Array, ""]) -> Float[Array, ""]: ...


def _warmed(step: Array, n_steps: Array, warmup: Number) -> tuple[Array, Array]:
    """(share of the peak while warming up, 0 to 1 progress through what follows); step counts from 0.

    The first update uses 1 / n_warmup of the peak, not 0: an update at rate 0 would be a step for nothing.
    """
    n_warmup = jnp.floor(warmup * n_steps)
    rise = jnp.minimum((step + 1) / jnp.maximum(n_warmup, 1), 1.0)
    progress = jnp.clip((step - n_warmup) / jnp.maximum(n_steps - n_warmup, 1), 0.0, 1.0)
    return rise, progress


@config
class Constant(Schedule):
    """Warm-up over a share of the steps, then the peak."""

    warmup: Number = 0.0

    def __post_init__(self):
        require_range(self, "warmup", at_least=0, at_most=1)

    def __call__(self, step, n_steps):
        return _warmed(step, n_steps, self.warmup)[0]


@config
class Linear(Schedule):
    """Warm-up over a share of the steps, then a straight line to `end` (a share of the peak)."""

    warmup: Number = 0.1
    end: Number = 0.0

    def __post_init__(self):
        require_range(self, "warmup", at_least=0, at_most=1)
        require_range(self, "end", at_least=0, at_most=1)

    def __call__(self, step, n_steps):
        rise, progress = _warmed(step, n_steps, self.warmup)
        return rise * (1 - (1 - self.end) * progress)


@config
class Cosine(Schedule):
    """Warm-up over a share of the steps, then half a cosine down to `end` (a share of the peak)."""

    warmup: Number = 0.1
    end: Number = 0.0

    def __post_init__(self):
        require_range(self, "warmup", at_least=0, at_most=1)
        require_range(self, "end", at_least=0, at_most=1)

    def __call__(self, step, n_steps):
        rise, progress = _warmed(step, n_steps, self.warmup)
        return rise * (self.end + (1 - self.end) * (1 + jnp.cos(jnp.pi * progress)) / 2)
