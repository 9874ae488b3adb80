"""What every algorithm is: settings of the update, and two functions. The trainer knows nothing else about it.

- `prepare(runtime, params, batch, key) -> batch`: once per batch, on the host, not differentiated. Roll out, score,
  reference log-probabilities, advantages, and the weights of every mean that is not a mean over rows.
- `loss(model, params, batch) -> (scalar, metrics)`: pure; compiled and differentiated. It reads only what `prepare` put
  into the batch. Loss and metrics are **means over the rows they are given**: the trainer averages them over
  microbatches. Metrics named `…/max` or `…/min` are reduced so instead.

A batch is a dict of arrays whose first axis is rows (pairs, for preferences). Its keys are described in
`rlhf.data.batches`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from jaxtyping import Array, Float

from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError
from rlhf.ops.optimizers import AdamW, Cosine, Optimizer, Schedule

Batch = dict[str, Any]
Params = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]
Form = Literal["conversation", "preference", "unpaired", "prompt"]


@dataclasses.dataclass
class Runtime:
    """What `prepare` may use; built once per run.

    generate: a `rlhf.sampling.sampler.Sampler`: `generate(params, prompts, n=…, method=…, max_new_tokens=…, step=…)`
        gives `n` answers to each prompt with their log-probabilities; the noise depends on the seed, the step, the
        prompt's row, the number of the answer and the position.
    memory: arrays an algorithm keeps between steps (a running mean, an adaptive coefficient, a moving reference). Empty
        at the start; part of every checkpoint.
    """

    model: Any
    tokenizer: Any
    reference: Any = None
    generate: Callable | None = None
    reward: Callable | None = None
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)


@config
class Algorithm:
    """Settings that every algorithm has.

    learning_rate: peak, after warm-up.
    batch_size: rows (pairs, prompts) per optimizer batch, over all devices.
    microbatch_size: rows whose activations are in memory at once, over all devices; divides batch_size.
    clip_norm: gradients of a larger global norm are scaled down to it.
    epochs: passes over each prepared batch.
    minibatches: optimizer steps per such pass.
    """

    form: ClassVar[Form]

    learning_rate: Number
    batch_size: int
    microbatch_size: int
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Cosine()
    clip_norm: Number = 1.0
    epochs: int = 1
    minibatches: int = 1

    def __post_init__(self):
        require_range(self, "learning_rate", at_least=0)
        require_range(self, "clip_norm", above=0)
        for name in ("batch_size", "microbatch_size", "epochs", "minibatches"):
            require_range(self, name, at_least=1)
        if self.batch_size % self.minibatches:
            raise ConfigError(
                f"algorithm.batch_size={self.batch_size} must be a multiple of algorithm.minibatches={self.minibatches}"
            )
        rows = self.batch_size // self.minibatches
        if rows % self.microbatch_size:
            divisors = [d for d in range(1, rows + 1) if rows % d == 0 and d <= self.microbatch_size]
            raise ConfigError(
                f"algorithm.microbatch_size={self.microbatch_size} must divide the {rows} rows of an optimizer step "
                f"(batch_size {self.batch_size} / minibatches {self.minibatches}); try {divisors[-1]}"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether `prepare` asks `runtime.reference` for log-probabilities; if not, none is loaded."""
        return False

    def provide_reference(self, live: Any, batches: Callable, key: Mapping[str, str]) -> Any:
        """What `runtime.reference` becomes, given the reference with its weights (see `rlhf.algorithms.reference`)."""
        return live

    @property
    def needs_reward(self) -> bool:
        """Whether `prepare` generates answers and asks `runtime.reward` for their scores."""
        return False

    @property
    def needs_whole_batch(self) -> bool:
        """Whether the loss compares rows with each other, so that a step's rows must be one microbatch."""
        return False

    def expected_first_loss(self) -> float | None:
        """The loss of the very first step, where theory gives it whatever the data are; None elsewhere."""
        return None

    def prepare(self, runtime: Runtime, params: Params, batch: Batch, key: Array) -> Batch:
        raise NotImplementedError

    def loss(self, model: Any, params: Params, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        raise NotImplementedError
