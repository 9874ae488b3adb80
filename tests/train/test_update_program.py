"""The compiled update: as many instructions for any depth, and no array of the parameters' size too many."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf.algorithms.sft import SFT
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.ops.optimizers import AdamW, Lion
from rlhf.train.update import eager_update, initial_optimizer

SMALL = Architecture(512, 64, 128, 6, 2, 1, 32, 32**-0.5, 16)


def compiled(architecture, remat="block", time=16):
    model, shape = Gemma3(architecture, remat=remat), jax.ShapeDtypeStruct
    algorithm = jax.tree.map(jnp.float32, SFT(learning_rate=1e-5, batch_size=1, microbatch_size=1))
    params = {"model": model.abstract()}
    counts = {"n_updates": jnp.int32(0), "n_skipped": jnp.int32(0)}
    state = jax.eval_shape(
        lambda p: {"params": p, "optimizer": initial_optimizer(algorithm, p), **counts},
        params,
    )  # fmt: skip
    batch = {name: shape((1, time), "int32") for name in ("tokens", "segments", "positions")}
    batch |= {"is_answer": shape((1, time), bool), "weight": shape((1, time), "float32"), "row": shape((1,), "int32")}
    run = jax.jit(partial(eager_update, model=model), donate_argnums=0)
    done = run.lower(state, {}, batch, algorithm, jnp.int32(1)).compile()
    return done, sum(x.size * 4 for x in jax.tree.leaves(params))


def test_depth_adds_no_instruction():
    """So that 62 layers compile in the time of 18."""
    counts = [compiled(dataclasses.replace(SMALL, layers=n))[0].as_text().count(" = ") for n in (18, 62)]
    assert abs(counts[1] - counts[0]) < 0.02 * counts[0]


def test_the_update_needs_the_gradients_and_little_else():
    """Moments and parameters change in place: copies of both moments would be another whole."""
    wide = dataclasses.replace(SMALL, width=256, ff_width=1024, vocab_size=4096)
    done, n_bytes = compiled(wide)
    assert done.memory_analysis().temp_size_in_bytes < 1.3 * n_bytes


@pytest.mark.parametrize("optimizer", [AdamW(weight_decay=0.1), Lion()])
def test_a_step_is_optax_s_and_a_skipped_one_changes_nothing(optimizer):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)}
    gradient = jax.tree.map(lambda x: x * 0.3 + 0.1, params)
    transform = optimizer.transform(1.0)
    ours = theirs = transform.init(params)
    for _ in range(3):
        mine, ours = optimizer.step(gradient, ours, params, jnp.bool_(True))
        expected, theirs = transform.update(gradient, theirs, params)
        np.testing.assert_allclose(mine["w"], expected["w"], rtol=1e-5)
        params = optax.apply_updates(params, mine)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    bad = jax.tree.map(lambda x: x * jnp.nan, gradient)
    _, kept = optimizer.step(bad, ours, params, jnp.bool_(False))
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(one, other)
