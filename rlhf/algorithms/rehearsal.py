"""What an algorithm's `prepare` gives, found out without weights, data or devices: by calling it once with stand-ins.

The rows are as long as they may be, the model gives zeros, answers are drawn from nothing and rewards are random. Only
shapes, types and names of the result mean something.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.algorithms.base import Algorithm, Runtime
from rlhf.algorithms.reference import LiveReference, Precomputed
from rlhf.data.batches import collate
from rlhf.data.encode import TWO_SIDED, Examples, Prompt, Source, TokenRow
from rlhf.data.examples import PAIR, Grade
from rlhf.model.tokenizer import Tokenizer
from rlhf.rewards.base import Scores
from rlhf.sampling.generate import Generation
from rlhf.sampling.sampler import Completion, Rollout
from rlhf.sampling.settings import SamplingSettings

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """batch: arrays that a prepared batch has. remembers: components that the algorithm keeps a second copy of."""

    batch: Shapes
    remembers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Blank:
    """A model whose every number is 0."""

    architecture: Any

    def token_logprobs(self, params: Any, batch: Any, temperature: Any = 1.0) -> Any:
        return jnp.zeros(batch["tokens"].shape)

    def hidden_of(self, params: Any, batch: Any) -> Any:
        return jnp.zeros((*batch["tokens"].reshape(-1, batch["tokens"].shape[-1]).shape, self.architecture.width))


def rehearse(
    algorithm: Algorithm,
    architecture: Any,
    components: dict[str, Any],
    max_length: int,
    sampling: SamplingSettings,
    n_row_shards: int = 1,
) -> Rehearsal:
    """The shapes of a prepared batch.

    components: abstract parameters by name. max_length: tokens of a row; of a prompt, where answers are generated.
    n_row_shards: as in `Runtime`.
    """
    examples = _examples(algorithm, max_length)
    params, model = _small(components), _Blank(architecture)
    runtime = Runtime(model, Tokenizer(), generate=_Writer(sampling), reward=_rewards, examples=examples)
    runtime.prompts, runtime.more_prompts = examples, lambda start, n: examples.prompts[:n]
    runtime.n_row_shards = n_row_shards
    runtime.reference = LiveReference(model, params, algorithm.microbatch_size)
    rows = collate(examples, range(algorithm.batch_size))
    batch = algorithm.prepare(runtime, params, rows, jax.random.key(0))
    shapes = {name: jax.ShapeDtypeStruct(np.shape(x), jnp.asarray(x).dtype) for name, x in batch.items()}
    return Rehearsal(shapes, tuple(runtime.memory.get("reference", ())))


def keeps_reference(algorithm: Algorithm) -> bool:
    """Whether the weights of a reference are in memory while training goes on."""
    return algorithm.needs_reference and not isinstance(getattr(algorithm, "reference", None), Precomputed)


def _small(components: dict[str, Any]) -> dict[str, Any]:
    """Parameters of which only the vectors of the whole model, which heads are made of, have their shape."""

    def of(path: Any, leaf: Any) -> np.ndarray:
        is_vector = "layers" not in jax.tree_util.keystr(path) and len(getattr(leaf, "shape", ())) < 2
        return np.zeros(leaf.shape if is_vector else (), np.float32)

    return jax.tree_util.tree_map_with_path(of, components)


def _examples(algorithm: Algorithm, max_length: int) -> Examples:
    """As many rows as a batch has, each as long as it may be and all of it an answer, all different."""
    n, form, n_prompt = algorithm.batch_size, algorithm.form, 1
    sides = 2 if form in TWO_SIDED else 1

    def row(number: int) -> TokenRow:
        tokens = np.full(max_length, 10 + number % 200, np.int32)
        return TokenRow(tokens, np.arange(max_length) >= n_prompt, n_prompt)

    prompts = [Prompt((10 + i % 200,) * max_length, "0", {}, i) for i in range(n)] if form == "prompt" else []
    return Examples(
        form=form,
        sequences=[(row(i),) * sides for i in range(n)],
        packs=[(i,) for i in range(n)],
        prompts=prompts,
        is_desirable=[i % 2 == 0 for i in range(n)],
        grades=[Grade(PAIR, 0.0)] * n,
        sources=[Source("rehearsal", {})] * n,
        pictures=[()] * n,
        n_slots=0,
        vision=None,
        n_time=max_length,
        n_joint=None,
        pad=0,
        n_dropped=0,
        n_truncated=0,
        fingerprint="",
    )


class _Writer:
    """Answers of the greatest length, each made of one token, other than its neighbours."""

    def __init__(self, settings: SamplingSettings):
        self.settings = settings
        self.shapes: list[Any] = []  # none is planned

    def __call__(
        self, params: Any, prompts: Any, *, n: int, max_new_tokens: int, wants_entropy: bool = False, **_: Any
    ) -> Rollout:
        shape = (len(prompts) * n, max_new_tokens)
        zeros = np.zeros(shape, np.float32)
        lengths = np.full(shape[0], max_new_tokens, np.int32)
        lengths[::2] = max(1, max_new_tokens // 2)
        ends = ["length" if at == max_new_tokens else "stop" for at in lengths]
        tokens = np.broadcast_to(10 + np.arange(shape[0], dtype=np.int32)[:, None] % 200, shape)
        written = Generation(tokens, zeros, zeros, zeros, None, lengths, ends)
        completions = [Completion("", int(at), end) for at, end in zip(lengths, ends, strict=True)]
        return Rollout(completions, written, n, 1.0)


def _rewards(answers: Any, step: int) -> Scores:
    """Different ones, so that no group is without spread."""
    total = np.random.default_rng(step).normal(size=len(answers)).astype(np.float32)
    return Scores(total, {"reward": total}, np.ones(len(answers), bool), {}, 0.0, {})
