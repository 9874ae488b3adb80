"""Attention a block of queries at a time, against all at once; and that it costs what it says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.model import attention
from rlhf.model.attention import Places, blocked, mixer, plain

WINDOW, BLOCK, TIME = 6, 8, 45  # the last block is not full


def segments_of(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    """(segments, positions) of one row; a negative length is padding."""
    segments, positions, number = [], [], 0
    for n in lengths:
        number += n > 0
        segments += [number if n > 0 else 0] * abs(n)
        positions += list(range(n)) if n > 0 else [0] * -n
    return np.array(segments, np.int32), np.array(positions, np.int32)


def rows(*each) -> Places:
    segments, positions = (jnp.asarray(np.stack(x)) for x in zip(*(segments_of(*one) for one in each), strict=True))
    return Places(positions, segments)


def packed() -> Places:
    return rows((45,), (20, 15, -10), (-7, 38), (3, 2, 40))


def joint() -> Places:
    """A beginning and two continuations of it; the second lies farther from it than a window."""
    places = rows((15, 12, 18), (4, 20, 10, -11), (-45,), (30, 5, 10))
    segments = np.asarray(places.segments)
    prefixes = np.where(segments > 1, 1, 0).astype(np.int32)
    n_begin = (segments == 1).sum(1, keepdims=True)
    positions = np.asarray(places.positions) + np.where(segments > 1, n_begin, 0).astype(np.int32)
    return Places(jnp.asarray(positions), jnp.asarray(segments), jnp.asarray(prefixes))


def with_images(places: Places) -> Places:
    """Pictures of 7 tokens, one across the edge of two blocks, one longer than the window."""
    images = np.zeros(places.positions.shape, np.int32)
    images[0, 2:9], images[0, 12:19], images[1, 5:12], images[3, 6:13] = 1, 2, 1, 1
    images *= np.asarray(places.segments) > 0
    return places._replace(images=jnp.asarray(images), image_tokens=7)


CASES = {
    "packed": packed(),
    "joint": joint(),
    "images": with_images(packed()),
    "joint images": with_images(joint()),
}


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(4, TIME, n, 8)), jnp.float32) for n in (4, 2, 2, 4)]


def run(mix, arrays, is_global, is_real):
    """Result, and gradients of its product with a random array, at the tokens that are no padding."""
    *inputs, weight = arrays

    def total(*x):
        out = mix(*x, is_global)
        return jnp.sum(jnp.where(is_real, out * weight, 0.0)), out

    (_, out), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*inputs)
    return jnp.where(is_real, out, 0.0), gradients


@pytest.mark.parametrize("case", CASES)
def test_blocks_equal_the_whole(arrays, case):
    places = CASES[case]
    is_real = (places.segments > 0)[:, :, None, None]
    whole, cut = (
        jax.jit(lambda g, *x, m=mix: run(m, x, g, is_real))
        for mix in (plain(places, WINDOW), blocked(places, WINDOW, BLOCK))
    )
    for is_global in (False, True):
        assert_same(cut(is_global, *arrays), whole(is_global, *arrays))


def test_whether_a_layer_is_global_may_be_known(arrays):
    places = CASES["joint images"]
    is_real = (places.segments > 0)[:, :, None, None]
    mix = blocked(places, WINDOW, BLOCK)
    for is_global in (False, True):
        known = jax.jit(lambda *x, g=is_global: mix(*x, g))(*arrays[:3])
        expected = jax.jit(lambda *x, g=is_global: plain(places, WINDOW)(*x, g))(*arrays[:3])
        assert_same(jnp.where(is_real, known, 0), jnp.where(is_real, expected, 0))


def assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def cost(time: int, is_global: bool, make) -> int:
    """Bytes beside inputs and results, of value and gradient with 1B's heads."""
    shape = jax.ShapeDtypeStruct
    places = Places(*[shape((8, time), "int32")] * 2)
    inputs = [shape((8, time, n, 256), "float32") for n in (4, 1, 1)]

    def total(places, *x):
        return jnp.sum(make(places)(*x, is_global))

    compiled = jax.jit(jax.value_and_grad(total, argnums=(1, 2, 3))).lower(places, *inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_local_layers_cost_their_window():
    local = partial(mixer, window=512)
    whole = cost(4096, False, partial(plain, window=512))
    assert cost(4096, False, local) < whole / 8
    assert cost(4096, True, local) < whole / 4  # a global one: a block of queries at a time
    twice = cost(8192, False, local) / cost(4096, False, local)
    assert twice < 2.05


def test_local_layers_multiply_with_the_keys_in_reach_alone():
    """What a block's products are of: 512 queries, four heads of them, and 512 + 512 keys, not 4096."""
    places = Places(*[jnp.zeros((1, 4096), jnp.int32)] * 2)
    inputs = [jnp.zeros((1, 4096, n, 16)) for n in (4, 1, 1)]

    def shapes(is_global):
        graph = jax.make_jaxpr(lambda *x: mixer(places, 512)(*x, is_global))(*inputs)
        return {v.aval.shape for e in _equations(graph.jaxpr) if e.primitive.name == "dot_general" for v in e.outvars}

    assert shapes(False) == {(1, 1, 2048, 1024), (1, 1, 2048, 16)}
    assert shapes(True) == {(1, 1, 2048, 4096), (1, 1, 2048, 16)}


def _equations(graph):
    for equation in graph.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_short_rows_are_run_whole():
    """Where a block and its window are most of a row, blocks would only cost."""
    assert attention._block_size(512) == 512
    for time, is_blocked in ((512, False), (1024, False), (1536, True), (4096, True)):
        places = Places(*[jax.ShapeDtypeStruct((1, time), "int32")] * 2)
        inputs = [jax.ShapeDtypeStruct((1, time, n, 16), "float32") for n in (4, 1, 1)]
        graph = jax.make_jaxpr(lambda p, *x: mixer(p, 512)(*x, False))(places, *inputs)
        found = any(e.primitive.name == "scan" for e in _equations(graph.jaxpr))
        assert found == is_blocked, time
