"""Attention over whole rows, for training: who sees whom, and what of queries × keys is in memory at once.

Short rows are one product of all queries and all keys. Long ones run a block of queries at a time; those of a local
layer meet only the keys that its window reaches, so that time and memory of a local layer grow with time × window and
memory of a global one with block × time. The results are the same (`plain` and `blocked` differ by rounding).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from rlhf.model.layers import attention_mask

_MASKED = -2.3819763e38  # finite, so that a row without any visible key (padding) gives numbers and not NaN
_COPY = 1 << 20  # added to the segment of a copied key

# mix(queries, keys, values, is_global) -> mixed; is_global: known while tracing, or data
Mix = Callable[[Array, Array, Array, Any], Array]


class Places(NamedTuple):
    """Where the tokens of each row are.

    positions: in their segments, whose tokens are neighbours. segments: 0 is padding. prefixes: a segment that a token
    sees besides its own, whose continuation that is; a row has one such beginning, and it is the row's. images: number
    of the image that a token is part of (0: text), of at most `image_tokens` neighbours each.
    """

    positions: Int[Array, "batch time"]
    segments: Int[Array, "batch time"]
    prefixes: Int[Array, "batch time"] | None = None
    images: Int[Array, "batch time"] | None = None
    image_tokens: int = 0

    def each(self, change: Callable[[Array], Array]) -> "Places":
        """The same change made to every array."""
        images, prefixes = (None if x is None else change(x) for x in (self.images, self.prefixes))
        return Places(change(self.positions), change(self.segments), prefixes, images, self.image_tokens)

    def mask(self, window: int | None) -> Bool[Array, "batch time time"]:
        """`attention_mask` of every token and every token."""
        return _visible(self, self, window)


def _visible(queries: Places, keys: Places, window: int | None) -> Bool[Array, "batch queries keys"]:
    own = (queries.positions, queries.segments, keys.positions, keys.segments)
    return attention_mask(*own, window, queries.prefixes, queries.images, keys.images)


def mixer(places: Places, window: int) -> Mix:
    """The attention of a model whose local layers see `window` tokens: `plain` or `blocked`, whichever costs less."""
    block = _block_size(window)
    is_long = 2 * places.positions.shape[1] >= 3 * (block + window)
    return blocked(places, window, block) if is_long else plain(places, window)


def _block_size(window: int) -> int:
    """Queries per block: of a window where that makes products of a good size."""
    return min(max(window, 256), 512)


def plain(places: Places, window: int) -> Mix:
    """All queries and all keys at once, masked."""
    local_mask, global_mask = places.mask(window), places.mask(None)

    def mix(queries: Array, keys: Array, values: Array, is_global: Any) -> Array:
        return attend(queries, keys, values, choose(is_global, global_mask, local_mask))

    return mix


def choose(condition: bool | Array, yes: Any, no: Any) -> Any:
    """`yes` or `no`: decided while tracing where the condition is known, by a select where it is data."""
    if isinstance(condition, bool):
        return yes if condition else no
    return jax.tree.map(partial(jnp.where, condition), yes, no)


def attend(
    queries: Float[Array, "batch queries heads head_width"],
    keys: Float[Array, "batch keys kv_heads head_width"],
    values: Float[Array, "batch keys kv_heads head_width"],
    is_visible: Bool[Array, "batch queries keys"],
) -> Float[Array, "batch queries heads head_width"]:
    """Grouped-query attention with a float32 softmax; the queries are already scaled."""
    group = queries.shape[2] // keys.shape[2]
    mask = jnp.repeat(is_visible, group, axis=1)[:, None]
    mixed = _mix(_grouped(queries, keys.shape[2]), keys.swapaxes(1, 2), values.swapaxes(1, 2), mask)
    return _ungrouped(mixed, group)


def _grouped(queries: Array, kv_heads: int) -> Float[Array, "batch kv_heads queries head_width"]:
    """Queries and group as one axis: every product, forward and backward, is one of plain matrices."""
    batch, n_queries, heads, head_width = queries.shape
    split = queries.reshape(batch, n_queries, kv_heads, heads // kv_heads, head_width).swapaxes(1, 2)
    return split.reshape(batch, kv_heads, -1, head_width)


def _ungrouped(mixed: Array, group: int) -> Float[Array, "batch queries heads head_width"]:
    batch, kv_heads, _, head_width = mixed.shape
    split = mixed.reshape(batch, kv_heads, -1, group, head_width).swapaxes(1, 2)
    return split.reshape(batch, -1, kv_heads * group, head_width)


def _scores(queries: Array, keys: Array, is_visible: Array) -> Float[Array, "batch kv_heads queries keys"]:
    scores = jnp.einsum("bkqh,bkth->bkqt", queries, keys, preferred_element_type=jnp.float32)
    return jnp.where(is_visible, scores, _MASKED)


def _softmax_product(queries: Array, keys: Array, values: Array, is_visible: Array) -> tuple[Array, Array]:
    """The mixed values, and the logarithm of each query's sum."""
    scores = _scores(queries, keys, is_visible)
    # Fused with the powers or not, as XLA on CPU finds it best with and without a gradient, it gives them other last
    # bits; reduce_precision to float32 changes nothing, and is not fused: ratios to scored answers begin at exactly 1.
    highest = jax.lax.reduce_precision(jnp.max(scores, axis=-1, keepdims=True), 8, 23)
    powers = jnp.exp(scores - highest)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    mixed = jnp.einsum("bkqt,bkth->bkqh", (powers / total).astype(values.dtype), values)
    return mixed, highest + jnp.log(total)


def _product_gradients(
    queries: Array, keys: Array, values: Array, is_visible: Array, mixed: Array, log_total: Array, gradient: Array
) -> tuple[Array, Array, Array]:
    """Of `_softmax_product`, for queries, keys and values.

    The shares are computed again from the logarithm of their sum, so that queries × keys is not kept. The sum over a
    row of shares · gradient, which the softmax's gradient needs, is that of result · gradient (Dao et al., 2022,
    FlashAttention, appendix B.2).
    """
    shares = jnp.exp(_scores(queries, keys, is_visible) - log_total)
    d_values = jnp.einsum("bkqt,bkqh->bkth", shares.astype(values.dtype), gradient)
    d_shares = jnp.einsum("bkqh,bkth->bkqt", gradient, values, preferred_element_type=jnp.float32)
    products = gradient.astype(jnp.float32) * mixed
    # reduce_precision to float32 changes nothing, but XLA on CPU doesn't fuse it: fused, the sum takes 4 times as long
    total = jnp.sum(jax.lax.reduce_precision(products, 8, 23), axis=-1, keepdims=True)
    d_scores = (shares * (d_shares - jax.lax.reduce_precision(total, 8, 23))).astype(values.dtype)
    d_queries = jnp.einsum("bkqt,bkth->bkqh", d_scores, keys)
    d_keys = jnp.einsum("bkqt,bkqh->bkth", d_scores, queries)
    return d_queries, d_keys, d_values


@jax.custom_vjp
def _mix(
    queries: Float[Array, "batch kv_heads queries head_width"],
    keys: Float[Array, "batch kv_heads keys head_width"],
    values: Float[Array, "batch kv_heads keys head_width"],
    is_visible: Bool[Array, "batch one queries keys"],
) -> Float[Array, "batch kv_heads queries head_width"]:
    return _mix_forward(queries, keys, values, is_visible)[0]


def _mix_forward(queries: Array, keys: Array, values: Array, is_visible: Array) -> tuple[Array, tuple]:
    found = _softmax_product(queries, keys, values, is_visible)
    mixed, log_total = (checkpoint_name(x, "mixed") for x in found)
    return mixed, (queries, keys, values, is_visible, mixed, log_total)


def _mix_backward(saved: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
    queries, keys, values, is_visible, mixed, log_total = saved
    return *_product_gradients(queries, keys, values, is_visible, mixed, log_total, gradient), None


_mix.defvjp(_mix_forward, _mix_backward)


class _Cut(NamedTuple):
    """How rows are cut.

    is_global: None where it is data. block: queries at a time. window: of local layers. ahead: keys past a block that
    its queries see. time: of the rows, a multiple of the block. tail: copied keys, which come after `window` empty
    ones, the row, and `ahead` empty ones.
    """

    is_global: bool | None
    block: int
    window: int
    ahead: int
    time: int
    tail: int

    def queries(self, x: Array, group: int, index: Any) -> Array:
        """Of an array [batch, heads, time · group, …]."""
        size = self.block * group
        return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=2)

    def keys(self, x: Array, index: Any, is_global: bool, axis: int = 2) -> Array:
        """Those that a block of queries can see."""
        if is_global:
            return jax.lax.slice_in_dim(x, self.window, self.window + self.time, axis=axis)
        near = jax.lax.dynamic_slice_in_dim(x, index * self.block, self.n_near, axis=axis)
        if not self.tail:
            return near
        return jnp.concatenate([near, jax.lax.slice_in_dim(x, -self.tail, None, axis=axis)], axis=axis)

    @property
    def n_near(self) -> int:
        return self.window + self.block + self.ahead

    def add(self, total: Array, part: Array, index: Any, is_global: bool) -> Array:
        """The gradient of `keys`, added to that of all keys."""
        if is_global:
            return total.at[:, :, self.window : self.window + self.time].add(part)
        start, near = index * self.block, part[:, :, : self.n_near]
        old = jax.lax.dynamic_slice_in_dim(total, start, self.n_near, axis=2)
        total = jax.lax.dynamic_update_slice_in_dim(total, old + near, start, axis=2)
        return total.at[:, :, total.shape[2] - self.tail :].add(part[:, :, self.n_near :]) if self.tail else total


def blocked(places: Places, window: int, block: int) -> Mix:
    """`plain` for long rows: `block` queries at a time, in local layers with the keys that they can see.

    A continuation's window also reaches back over what lies between into its beginning: the last `window` keys of that
    are copied to the end of the row, where every block finds them.
    """
    n_time = places.positions.shape[1]
    time = -(-n_time // block) * block
    n_tail = 0 if places.prefixes is None else window
    cut = _Cut(None, block, window, places.image_tokens if places.images is not None else 0, time, n_tail)
    start = _tail_start(places, window)

    def padded(x: Array, axis: int, before: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (before, time - n_time + (cut.ahead if before else 0))
        return jnp.pad(x, widths)

    def with_tail(x: Array) -> Array:
        """[batch, time, …] as keys are cut from."""
        whole = padded(x, 1, window)
        if not n_tail:
            return whole
        tail = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, window, axis=0))(whole, start)
        return jnp.concatenate([whole, tail], axis=1)

    at_queries = places.each(lambda x: padded(jnp.asarray(x), 1, 0))
    at_keys = places.each(lambda x: with_tail(jnp.asarray(x)))
    if n_tail:
        segments = at_keys.segments.at[:, -n_tail:].add(_COPY)
        at_keys = at_keys._replace(segments=segments)

    def mix(queries: Array, keys: Array, values: Array, is_global: Any) -> Array:
        kv_heads, group = keys.shape[2], queries.shape[2] // keys.shape[2]
        grouped = _grouped(padded(queries, 1, 0), kv_heads)
        keys, values = (with_tail(x).swapaxes(1, 2) for x in (keys, values))
        known, data = (is_global, None) if isinstance(is_global, bool) else (None, is_global)
        own_cut = cut._replace(is_global=known)
        mixed = _mix_blocks(grouped, keys, values, (at_queries[:4], at_keys[:4]), data, own_cut)
        return _ungrouped(mixed, group)[:, :n_time]

    return mix


def _tail_start(places: Places, window: int) -> Int[Array, "batch"] | None:
    """Where, in rows with `window` empty places before them, the last `window` keys of each row's beginning are."""
    if places.prefixes is None:
        return None
    beginning = jnp.max(places.prefixes, axis=1, keepdims=True)
    return jnp.sum((places.segments == beginning) & (beginning > 0), axis=1)


def _block_mask(places: tuple[tuple, tuple], cut: _Cut, group: int, index: Any, is_global: bool) -> Array:
    at_queries, at_keys = (Places(*x) for x in places)
    queries = at_queries.each(lambda x: jax.lax.dynamic_slice_in_dim(x, index * cut.block, cut.block, 1))
    keys = at_keys.each(lambda x: cut.keys(x, index, is_global, axis=1))
    if queries.prefixes is not None and not is_global:  # the beginning is seen as copied, and there alone
        copies = jnp.where(queries.prefixes > 0, queries.prefixes + _COPY, 0)
        queries = queries._replace(prefixes=copies)
    visible = _visible(queries, keys, None if is_global else cut.window)
    return jnp.repeat(visible, group, axis=1)[:, None]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _mix_blocks(queries, keys, values, places, is_global, cut):
    return _mix_blocks_forward(queries, keys, values, places, is_global, cut)[0]


def _either(known: bool | None, is_global: Any, run: Callable[[bool], Any]) -> Any:
    """`run` of a flag that is known while tracing, or of one that is data: only that branch takes time."""
    if known is not None:
        return run(known)
    return jax.lax.cond(is_global, lambda: run(True), lambda: run(False))


def _behind_each_other(blocks: Array) -> Array:
    """[blocks, batch, heads, block, …] as [batch, heads, time, …]."""
    ordered = jnp.moveaxis(blocks, 0, 2)
    return ordered.reshape(*ordered.shape[:2], -1, blocks.shape[-1])


def _mix_blocks_forward(queries, keys, values, places, is_global, cut):
    group = queries.shape[2] // cut.time

    def run(is_global: bool) -> tuple[Array, Array]:
        def step(_, index):
            mask = _block_mask(places, cut, group, index, is_global)
            k, v = (cut.keys(x, index, is_global) for x in (keys, values))
            return None, _softmax_product(cut.queries(queries, group, index), k, v, mask)

        _, (mixed, log_total) = jax.lax.scan(step, None, jnp.arange(cut.time // cut.block))
        return _behind_each_other(mixed), _behind_each_other(log_total)

    mixed, log_total = (checkpoint_name(x, "mixed") for x in _either(cut.is_global, is_global, run))
    return mixed, (queries, keys, values, places, is_global, mixed, log_total)


def _mix_blocks_backward(cut, saved, gradient):
    queries, keys, values, places, is_global, mixed, log_total = saved
    group = queries.shape[2] // cut.time

    def run(is_global: bool) -> tuple[Array, Array, Array]:
        def step(totals, index):
            mask = _block_mask(places, cut, group, index, is_global)
            k, v = (cut.keys(x, index, is_global) for x in (keys, values))
            q, m, t, g = (cut.queries(x, group, index) for x in (queries, mixed, log_total, gradient))
            d_queries, *parts = _product_gradients(q, k, v, mask, m, t, g)
            added = [cut.add(total, part, index, is_global) for total, part in zip(totals, parts, strict=True)]
            return added, d_queries

        zeros = [jnp.zeros(x.shape, jnp.float32) for x in (keys, values)]
        (d_keys, d_values), d_queries = jax.lax.scan(step, zeros, jnp.arange(cut.time // cut.block))
        return _behind_each_other(d_queries), d_keys.astype(keys.dtype), d_values.astype(values.dtype)

    return *_either(cut.is_global, is_global, run), None, None


_mix_blocks.defvjp(_mix_blocks_forward, _mix_blocks_backward)
