"""What every algorithm is: settings of the update, and two functions. The trainer knows nothing else about it.

- `prepare(runtime, params, batch, key) -> batch`: once per batch, on the host, not differentiated. Roll out, score,
  reference log-probabilities, advantages, and the weights of every mean that is not a mean over rows.
  It may say what it did in `runtime.log`.
- `loss(model, params, batch) -> (scalar, metrics)`: pure; compiled and differentiated. It reads only what `prepare` put
  into the batch. Loss and metrics are **means over the rows they are given**: the trainer averages them over
  microbatches. Metrics named `…/max` or `…/min` are reduced so instead.

A batch is a dict of arrays whose first axis is rows (pairs, for preferences). Its keys are described in
`rlhf.data.batches`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from jaxtyping import Array, Float

from rlhf.config import Number, config, require_range
from rlhf.errors import ConfigError
from rlhf.ops.optimizers import AdamW, Cosine, Optimizer, Schedule

Batch = dict[str, Any]
Params = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]
Form = Literal["conversation", "preference", "unpaired", "graded", "prompt"]


@dataclasses.dataclass
class StepLog:
    """What `prepare` tells of a step; the trainer takes it after each.

    metrics: join the step's row of the log. times: seconds, as `time/…_seconds`; not the same in two equal runs.
    rollouts: rows for `samples.jsonl`, the most telling first, on steps that show samples.
    """

    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    times: dict[str, float] = dataclasses.field(default_factory=dict)
    rollouts: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def take(self) -> "StepLog":
        """What was told since the last call."""
        taken = StepLog(self.metrics, self.times, self.rollouts)
        self.metrics, self.times, self.rollouts = {}, {}, []
        return taken


@dataclasses.dataclass
class Runtime:
    """What `prepare` may use; built once per run.

    generate: a `rlhf.sampling.sampler.Sampler`: `generate(params, prompts, n=…, method=…, max_new_tokens=…, step=…)`
        gives `n` answers to each prompt with their log-probabilities; the noise depends on the seed, the step, the
        prompt's row, the number of the answer and the position.
    reward: a `rlhf.rewards.weighted.Rewards`: `reward(answers, step)` gives their scores.
    examples: the training rows as `Examples`, in a training run.
    prompts: the same, where the algorithm's form is `prompt`.
    more_prompts: `more_prompts(start, n)`: n prompts from place `start` of a second endless order of the training rows,
        for an algorithm that needs more than its batch. It keeps the place in `memory`.
    memory: arrays an algorithm keeps between steps (a running mean, an adaptive coefficient, a moving reference). Empty
        at the start; part of every checkpoint.
    step: number of the batch that is prepared, from 0.
    n_row_shards: parts into which the rows of every microbatch are split, over devices.
    """

    model: Any
    tokenizer: Any
    reference: Any = None
    generate: Callable | None = None
    reward: Callable | None = None
    examples: Any = None
    prompts: Any = None
    more_prompts: Callable[[int, int], list] | None = None
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    log: StepLog = dataclasses.field(default_factory=StepLog)
    step: int = 0
    n_row_shards: int = 1


@config
class Algorithm:
    """Settings that every algorithm has.

    learning_rate: peak, after warm-up.
    batch_size: rows (pairs, prompts) per batch, over all devices.
    microbatch_size: rows whose activations are in memory at once, over all devices; divides those of a minibatch.
    clip_norm: gradients of a larger global norm are scaled down to it; infinity scales none.
    epochs: passes over each prepared batch.
    minibatches: optimizer steps per such pass.

    form: what the rows of a batch are.
    headline: the metrics that a line of the log shows, where all would be too many.
    """

    form: ClassVar[Form]
    headline: ClassVar[tuple[str, ...]] = ()

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
        require_range(self, "clip_norm", above=0, may_be_infinite=True)
        require_range(self, "batch_size", "microbatch_size", "epochs", "minibatches", at_least=1)
        self.require_divisible()

    def require_divisible(self) -> None:
        """Check that minibatches and microbatches divide the rows without rest."""
        n_rows, told = self.rows_per_batch, f"batch_size={self.batch_size}"
        if n_rows != self.batch_size:
            told += f" × {n_rows // self.batch_size} = {n_rows} rows"
        if n_rows % self.minibatches:
            raise ConfigError(f"algorithm.{told} must be a multiple of algorithm.minibatches={self.minibatches}")
        rows = n_rows // self.minibatches
        if rows % self.microbatch_size:
            divisors = [d for d in range(1, rows + 1) if rows % d == 0 and d <= self.microbatch_size]
            raise ConfigError(
                f"algorithm.microbatch_size={self.microbatch_size} must divide the {rows} rows of an optimizer step "
                f"({told.replace('=', ' ', 1)} / minibatches {self.minibatches}); try {divisors[-1]}"
            )

    @property
    def rows_per_batch(self) -> int:
        """Rows of a prepared batch, which minibatches and microbatches are cut from; prompts may have several each."""
        return self.batch_size

    def rows_at_once(self, batch: Batch) -> int:
        """Rows of this prepared batch that are one microbatch; fewer than `microbatch_size` where a row has several."""
        return self.microbatch_size

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

    @property
    def stops_early(self) -> bool:
        """Whether `is_far` may end the optimizer steps of a batch: if not, none waits for another's metrics."""
        return False

    def is_far(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metrics of an optimizer step say that the rest of this batch's should be left out."""
        return False

    def components(self, params: Params, load: Callable[[str], Params], seed: int) -> Params:
        """Further components of the parameters, which are trained beside the policy: a critic, a head.

        params: the policy's. load: the parameters of a checkpoint.
        """
        return {}

    def learning_rates(self, names: Sequence[str], n_done: Array, n_total: Array) -> dict[str, Number]:
        """The learning rate of each trained component in the update after `n_done` of `n_total`."""
        return dict.fromkeys(names, self.learning_rate * self.schedule(n_done, n_total))

    def clip_groups(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Trained components whose gradients have one norm that `clip_norm` bounds."""
        return [tuple(names)]

    def finish(self, runtime: Runtime, params: Params, seed: int) -> Params:
        """Components as they should be after the last step; called before the last checkpoint. {}: as they are."""
        return {}

    def report(
        self, rows: Sequence[Mapping[str, float]], groups: Sequence[str] | None, params: Params
    ) -> dict[str, Any]:
        """What an evaluation says besides the means of the metrics, as JSON values.

        rows: the metrics of each held-out row as if it were alone. groups: what each row is counted under, if anything.
        """
        return {}

    def expected_first_loss(self) -> float | None:
        """The loss of the very first step, where theory gives it whatever the data are; None elsewhere."""
        return None

    def prepare(self, runtime: Runtime, params: Params, batch: Batch, key: Array) -> Batch:
        raise NotImplementedError

    def loss(self, model: Any, params: Params, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        raise NotImplementedError
