"""The compiled programs of generation, and the arrays between them.

`prefill` runs a few prompts through the model into a cache of their own; `seat` copies them to free entries of the
prompts that are being answered; `decode` draws tokens until enough answers have ended. A shape decides what is
compiled, everything else is data: prompts, methods, rules, numbers of tokens.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from rlhf.model.gemma3 import Gemma3, Tree
from rlhf.sampling import cache as caches
from rlhf.sampling.cache import LayerCache, Pictures
from rlhf.sampling.draw import draw
from rlhf.sampling.methods import Numbers
from rlhf.sampling.rules import ALTERNATIVES, Rules, Seen, alternatives, restrict, score
from rlhf.sampling.shapes import Shape


@dataclasses.dataclass(frozen=True)
class Setting:
    """What else programs are compiled for. mesh: None on one device."""

    model: Gemma3
    cache_dtype: str
    mesh: Mesh | None

    def spread(self, tree: Any) -> Any:
        """Arrays split by rows, caches by heads too, where these divide; the same in each program, so that the next one
        finds them as it was compiled for."""
        mesh = self.mesh
        if mesh is None:
            return tree
        put = jax.lax.with_sharding_constraint
        return jax.tree.map(lambda x: put(x, NamedSharding(mesh, self._spec(x.shape))), tree)

    def _spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        assert self.mesh is not None
        n_rows, n_heads = self.mesh.shape["data"] * self.mesh.shape["fsdp"], self.mesh.shape["tensor"]
        rows = ("data", "fsdp") if shape and shape[0] % n_rows == 0 else None
        heads = "tensor" if len(shape) == 4 and shape[1] % n_heads == 0 else None
        return PartitionSpec(*(rows, heads)[: len(shape)])


class Prompts(NamedTuple):
    """Prompts that are being answered. lengths: 1 for an entry without one."""

    tokens: Int[Array, "entries time"]
    lengths: Int[Array, "entries"]
    cache: list[LayerCache]


class Answers(NamedTuple):
    """What was written so far.

    scores: of each token its log-probability, the same under what it was drawn from, and the entropy.
    likely: ids and log-probabilities of the most likely tokens, if the shape has them.
    """

    tokens: Int[Array, "rows time"]
    scores: Float[Array, "rows time three"]
    likely: tuple[Array, Array] | None
    cache: list[LayerCache]


class Rows(NamedTuple):
    """Where every row is; the host's, changed by `decode`.

    last: its newest token, or its prompt's last one. steps: tokens drawn. least, most: fewest and most to draw.
    numbers: what its noise depends on: the prompt's row and the sample.
    """

    is_active: Bool[Any, "rows"]
    last: Int[Any, "rows"]
    steps: Int[Any, "rows"]
    least: Int[Any, "rows"]
    most: Int[Any, "rows"]
    numbers: Int[Any, "rows two"]
    method: Numbers


@partial(jax.jit, static_argnames=("setting", "shape"))
def empty(setting: Setting, shape: Shape) -> tuple[Prompts, Answers]:
    """Before the first prompt."""
    a = setting.model.architecture
    room = partial(caches.empty_cache, a, dtype=setting.cache_dtype, has_rings=True)
    tokens = jnp.zeros((shape.entries, shape.prompt_tokens), jnp.int32)
    prompts = Prompts(tokens, jnp.ones(shape.entries, jnp.int32), room(shape.entries, shape.prompt_tokens))
    places, n = (shape.rows, shape.new_tokens), min(ALTERNATIVES, a.vocab_size)
    likely = (jnp.zeros((*places, n), jnp.int32), jnp.zeros((*places, n))) if shape.has_alternatives else None
    answers = Answers(jnp.zeros(places, jnp.int32), jnp.zeros((*places, 3)), likely, room(*places))
    return setting.spread((prompts, answers))


@partial(jax.jit, static_argnames=("setting", "rows", "prompt_tokens"))
def empty_stage(setting: Setting, rows: int, prompt_tokens: int) -> list[LayerCache]:
    """Before a prefill; all layers have room for whole prompts."""
    a = setting.model.architecture
    return setting.spread(caches.empty_cache(a, rows, prompt_tokens, setting.cache_dtype, has_rings=False))


def idle_rows(n_rows: int) -> Rows:
    """Rows that write nothing."""
    zeros = partial(np.zeros, n_rows)
    method = Numbers(*(np.ones(n_rows, np.float32) for _ in Numbers._fields))
    last, steps, least, most = (zeros(np.int32) for _ in range(4))
    return Rows(zeros(bool), last, steps, least, most, np.zeros((n_rows, 2), np.int32), method)


@partial(jax.jit, static_argnames=("setting", "chunk"), donate_argnames=("cache",))
def prefill(
    setting: Setting,
    weights: Tree,
    cache: list[LayerCache],
    tokens: Int[Any, "batch time"],
    chunks: tuple[Any, Any],
    chunk: int,
    pictures: Pictures | None = None,
) -> list[LayerCache]:
    """See `rlhf.sampling.cache.prefill`."""
    tokens, chunks = jax.tree.map(jnp.asarray, (tokens, chunks))
    cache = caches.prefill(setting.model, weights, cache, tokens, chunks, chunk, pictures)
    return setting.spread(cache)


@partial(jax.jit, static_argnames=("setting",), donate_argnames=("staged",))
def keep_answer(
    setting: Setting, staged: list[LayerCache], answers: Answers, n_kept: Any, n_drawn: Any
) -> list[LayerCache]:
    """See `rlhf.sampling.cache.keep_answer`."""
    n_kept, n_drawn = jax.tree.map(jnp.asarray, (n_kept, n_drawn))
    return setting.spread(caches.keep_answer(staged, answers.cache, n_kept, n_drawn))


class Seats(NamedTuple):
    """Which staged prompts go to which entries: the first `n` of these."""

    n: Int[Any, ""]
    places: Int[Any, "batch"]
    entries: Int[Any, "batch"]


@partial(jax.jit, static_argnames=("setting",), donate_argnames=("prompts",))
def seat(
    setting: Setting,
    prompts: Prompts,
    staged: list[LayerCache],
    tokens: Int[Any, "batch time"],
    lengths: Int[Any, "batch"],
    seats: Seats,
) -> Prompts:
    """Copy staged prompts to their entries."""
    tokens, lengths, seats = jax.tree.map(jnp.asarray, (tokens, lengths, seats))

    def one(number, prompts):
        place, entry = seats.places[number], seats.entries[number]
        cache = caches.take_seat(setting.model, prompts.cache, entry, staged, place, lengths[place] - 1)
        return Prompts(
            prompts.tokens.at[entry].set(tokens[place]), prompts.lengths.at[entry].set(lengths[place]), cache
        )

    return setting.spread(jax.lax.fori_loop(0, seats.n, one, prompts))


@partial(jax.jit, static_argnames=("setting",), donate_argnames=("answers",))
def decode(
    setting: Setting,
    weights: Tree,
    prompts: Prompts,
    answers: Answers,
    rows: Rows,
    rules: Rules,
    key: Key[Array, ""],
    until: tuple[Any, Any],
) -> tuple[Answers, Rows]:
    """Draw tokens until at most until[0] rows are active, or until[1] tokens are drawn in each."""
    rows, until = jax.tree.map(jnp.asarray, (rows, until))
    fold = jax.vmap(jax.random.fold_in)
    row_keys = fold(jax.vmap(partial(jax.random.fold_in, key))(rows.numbers[:, 0]), rows.numbers[:, 1])
    lanes = rows.last.shape[0] // prompts.lengths.shape[0]
    lengths = jnp.repeat(prompts.lengths, lanes)

    def goes_on(state):
        n_steps, _, rows = state
        return (jnp.sum(rows.is_active) > until[0]) & (n_steps < until[1])

    def advance(state):
        n_steps, answers, rows = state
        hidden, cache = caches.decode(
            setting.model, weights, prompts.cache, answers.cache, prompts.lengths - 1, rows.last, rows.steps
        )
        logits = setting.model.unembed(weights, hidden)
        uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(fold(row_keys, lengths + rows.steps))
        seen = Seen(prompts.tokens, prompts.lengths, answers.tokens, rows.steps)
        allowed = restrict(rules, rows.method, logits, rows.steps < rows.least, seen)
        drawn = draw(rows.method, allowed, uniforms)
        scores, log_totals = score(rules, rows.method, logits, drawn.tokens)
        columns = jnp.stack([scores.logprobs, drawn.filtered_logprobs, scores.entropies], axis=-1)
        likely = None if answers.likely is None else alternatives(rows.method, logits, log_totals)
        answers = _written(answers, rows, drawn.tokens, columns, likely)._replace(cache=cache)
        return n_steps + 1, answers, _moved_on(rows, rules, drawn.tokens)

    _, answers, rows = jax.lax.while_loop(goes_on, advance, (jnp.int32(0), answers, rows))
    return setting.spread(answers), setting.spread(rows)


def _written(answers: Answers, rows: Rows, tokens: Array, scores: Array, likely: Any) -> Answers:
    """The answers with one more token in every active row."""
    places = jnp.where(rows.is_active, rows.steps, answers.tokens.shape[1])  # past the end: dropped

    def put(old, new):
        return old.at[jnp.arange(len(places)), places].set(new, mode="drop")

    old = answers.tokens, answers.scores, answers.likely
    tokens, scores, likely = jax.tree.map(put, old, (tokens, scores, likely))
    return Answers(tokens, scores, likely, answers.cache)


def _moved_on(rows: Rows, rules: Rules, tokens: Array) -> Rows:
    steps = rows.steps + rows.is_active
    is_active = rows.is_active & ~rules.is_stop[tokens] & (steps < rows.most)
    return rows._replace(is_active=is_active, last=jnp.where(rows.is_active, tokens, rows.last), steps=steps)
