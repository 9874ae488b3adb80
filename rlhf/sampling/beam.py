"""Beam search over the same caches: the beams of a prompt are its lanes, which change places as better ones appear."""

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf.config import Number
from rlhf.errors import ConfigError, DataError
from rlhf.model.gemma3 import Gemma3, Tree
from rlhf.model.sharding import whole
from rlhf.sampling import cache as caches
from rlhf.sampling import programs
from rlhf.sampling.draw import candidates
from rlhf.sampling.generate import Generation, check_prompts, rules_for, setting_for
from rlhf.sampling.methods import Beam
from rlhf.sampling.programs import Prompts, Setting
from rlhf.sampling.rules import Rules
from rlhf.sampling.schedule import PromptImages, Stage, Task, stage_size
from rlhf.sampling.shapes import SLOTS, SMALLEST, Shape, bucket
from rlhf.sampling.weights import DecodingWeights

_NEVER = -1e30  # log-probability of a beam that does not exist yet


class Best(NamedTuple):
    """The best ended answer of each prompt. values: log-probability / tokens ** length_penalty."""

    values: Float[Array, "entries"]
    tokens: Int[Array, "entries time"]
    logprobs: Float[Array, "entries time"]
    lengths: Int[Array, "entries"]
    is_stopped: Bool[Array, "entries"]


class Beams(NamedTuple):
    """Beginnings of answers. sums: of their log-probabilities."""

    step: Int[Array, ""]
    sums: Float[Array, "entries beams"]
    tokens: Int[Array, "entries beams time"]
    logprobs: Float[Array, "entries beams time"]
    last: Int[Array, "rows"]
    cache: list[caches.LayerCache]
    best: Best


def beam_search(
    model: Gemma3,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    method: Beam,
    max_new_tokens: int,
    stop_ids: Collection[int],
    forbidden_ids: Collection[int] = (),
    pictures: Sequence[PromptImages | None] | None = None,
    slots: int = SLOTS,
    weights: DecodingWeights | None = None,
    cache_dtype: str | None = None,
) -> Generation:
    """The best answer to each prompt that a search with `method.width` beams finds.

    A beam ends at a stop token or at `max_new_tokens`; the search for a prompt ends when no beginning can become better
    than the answers that it has. Arguments as of `generate`; slots: beams at once.

    Raises:
        DataError, ConfigError: as `generate`; width is larger than `slots`.
    """
    vocab = model.architecture.vocab_size
    check_prompts(prompts, 1, max_new_tokens, vocab)
    if method.width > slots:
        raise ConfigError(f"width={method.width} of Beam must be at most {slots}, the answers written at once")
    if pictures is not None and len(pictures) != len(prompts):
        raise DataError(f"{len(prompts)} prompts need as many pictures, not {len(pictures)}")
    rules = rules_for(vocab, stop_ids, forbidden_ids, {}, 0, False)
    weights = DecodingWeights(model) if weights is None else weights
    setting, layers = setting_for(weights.model, params, cache_dtype), weights.of(params)
    entries = min(bucket(len(prompts), 1), max(1, slots // method.width))
    longest = bucket(max(map(len, prompts)), SMALLEST)
    shape = Shape(entries, method.width, longest, bucket(max_new_tokens, SMALLEST))
    images = [None] * len(prompts) if pictures is None else pictures
    tasks = [Task(tuple(p), 1, 0, (), 0, max_new_tokens, image) for p, image in zip(prompts, images, strict=True)]
    penalty = jnp.float32(method.length_penalty)
    found: list[Any] = []
    for start in range(0, len(tasks), entries):
        some = tasks[start : start + entries]
        seated = _seated(setting, shape, layers, some)
        best = jax.device_get(whole(_search(setting, shape, layers, seated, rules, penalty, np.int32(max_new_tokens))))
        found += [jax.tree.map(lambda x, i=i: x[i], best) for i in range(len(some))]
    return Generation(
        tokens=np.stack([one.tokens[:max_new_tokens] for one in found]),
        logprobs=np.stack([one.logprobs[:max_new_tokens] for one in found]),
        filtered_logprobs=np.zeros((len(found), max_new_tokens), np.float32),
        entropies=None,
        likely=None,
        n_tokens=np.array([one.lengths for one in found], np.int32),
        finish_reasons=["stop" if one.is_stopped else "length" for one in found],
    )


def _seated(setting: Setting, shape: Shape, weights: Tree, tasks: Sequence[Task]) -> Prompts:
    """The prompts prefilled, each in its entry."""
    prompts, _ = programs.empty(setting, shape)
    n_images = max([len(t.pictures.images) for t in tasks if t.pictures is not None], default=0)
    for has_images in (False, True):
        numbers = [i for i, task in enumerate(tasks) if (task.pictures is not None) == has_images]
        size = stage_size(shape, has_images)
        for start in range(0, len(numbers), size):
            some = {i: tasks[i] for i in numbers[start : start + size]}
            prompts, _ = Stage(setting, shape, weights, some, n_images).seat(prompts, list(some))
    return prompts


@functools.partial(jax.jit, static_argnames=("setting", "shape"))
def _search(
    setting: Setting, shape: Shape, weights: Tree, prompts: Prompts, rules: Rules, penalty: Number, most: Array
) -> Best:
    entries, width = shape.entries, shape.lanes
    places = (entries, width, shape.new_tokens)
    cache = caches.empty_cache(
        setting.model.architecture, shape.rows, shape.new_tokens, setting.cache_dtype, has_rings=True
    )
    tokens, scores = jnp.zeros(places, jnp.int32), jnp.zeros(places)
    none = jnp.zeros(entries, jnp.int32)
    best = Best(jnp.full(entries, -jnp.inf), tokens[:, 0], scores[:, 0], none, none > 0)
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)
    sums = jnp.tile(jnp.where(jnp.arange(width) == 0, 0.0, _NEVER)[None], (entries, 1))  # one beginning: the empty one
    beams = Beams(jnp.int32(0), sums, tokens, scores, jnp.repeat(last[:, 0], width), cache, best)

    def goes_on(beams):
        """Whether some beginning could still become the best, were all its further tokens certain."""
        hope = jnp.max(beams.sums, axis=-1) / most.astype(jnp.float32) ** penalty
        return (beams.step < most) & jnp.any(hope > beams.best.values)

    def advance(beams):
        steps = jnp.full(shape.rows, beams.step)
        hidden, cache = caches.decode(
            setting.model, weights, prompts.cache, beams.cache, prompts.lengths - 1, beams.last, steps
        )
        logits = setting.model.unembed(weights, hidden) + rules.bias[None]
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        return _grown(beams._replace(cache=cache), logprobs, rules, penalty, most)

    return jax.lax.while_loop(goes_on, advance, beams).best


def _grown(beams: Beams, logprobs: Float[Array, "rows vocab"], rules: Rules, penalty: Number, most: Array) -> Beams:
    """Every beginning with its most likely next tokens: those that end go to the best, the best others go on."""
    entries, width = beams.sums.shape
    # Of 2 · width tokens a beginning, at least width go on unless stop tokens are more than width.
    n = min(2 * width, logprobs.shape[-1])
    values, ids = (x.reshape(entries, width, n) for x in candidates(logprobs, n))
    sums = (beams.sums[:, :, None] + values).reshape(entries, -1)
    ids, steps = ids.reshape(entries, -1), beams.step + 1
    parents = jnp.broadcast_to(jnp.repeat(jnp.arange(width), n)[None], ids.shape)
    is_stopped = rules.is_stop[ids]
    is_end = (is_stopped | (steps >= most)) & (sums > _NEVER / 2)

    def extended(places):
        parent, own = _pick(parents, places), _pick(sums, places) - _pick(beams.sums, _pick(parents, places))
        tokens = _pick(beams.tokens, parent).at[:, :, beams.step].set(_pick(ids, places))
        return parent, tokens, _pick(beams.logprobs, parent).at[:, :, beams.step].set(own)

    values = jnp.where(is_end, sums / steps.astype(jnp.float32) ** penalty, -jnp.inf)
    place = jnp.argmax(values, axis=-1)[:, None]
    _, tokens, scores = extended(place)
    length = jnp.full(entries, steps)
    ended = Best(_pick(values, place)[:, 0], tokens[:, 0], scores[:, 0], length, _pick(is_stopped, place)[:, 0])
    is_better = ended.values > beams.best.values
    best = jax.tree.map(
        lambda new, old: jnp.where(is_better.reshape(-1, *(1,) * (new.ndim - 1)), new, old), ended, beams.best
    )

    on, places = jax.lax.top_k(jnp.where(is_stopped, _NEVER, sums), width)
    parent, tokens, scores = extended(places)
    rows = (jnp.arange(entries)[:, None] * width + parent).reshape(-1)
    cache = jax.tree.map(lambda x: x[rows], beams.cache)
    return Beams(steps, on, tokens, scores, _pick(ids, places).reshape(-1), cache, best)


def _pick(x: Array, places: Int[Array, "entries beams"]) -> Array:
    """x[entry, places[entry, beam], …]."""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)
