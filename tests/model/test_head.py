"""The scalar head: where it is read, that padding does not matter, how it begins and how it is normalised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.data.joint import join
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.head import draw_head, last_hidden, last_place, normalised, output, raw_output, token_values
from rlhf.model.scorer import Scorer

SMALL = Architecture(
    vocab_size=64, width=32, ff_width=48, layers=2, heads=2, kv_heads=1, head_width=16, query_scale=0.25, window=8
)
MODEL = Gemma3(SMALL)


@pytest.fixture(scope="module")
def params():
    return {"model": jax.tree.map(jnp.asarray, MODEL.initialise(0)), "head": draw_head(3, SMALL.width)}


def row(length: int, time: int, start: int = 0) -> dict:
    """A sequence at places start …, the rest padding with tokens that must not matter."""
    tokens = np.full((1, time), 63, np.int32)
    tokens[0, start : start + length] = np.arange(5, 5 + length)
    place = np.arange(time)[None]
    is_there = (place >= start) & (place < start + length)
    return {
        "tokens": tokens,
        "segments": is_there.astype(np.int32),
        "positions": np.where(is_there, place - start, 0).astype(np.int32),
        "is_answer": is_there & (place >= start + 3),
    }


def test_the_last_place_is_found_from_the_mask():
    masks = np.array([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    assert last_place(masks).tolist() == [2, 4, 3, 0]


@pytest.mark.parametrize(("time", "start"), [(12, 0), (31, 0), (20, 7)])
def test_scores_do_not_depend_on_padding(params, time, start):
    alone = jax.jit(lambda b: output(params["head"], last_hidden(MODEL, params, b)))(row(10, 10))
    padded = jax.jit(lambda b: output(params["head"], last_hidden(MODEL, params, b)))(row(10, time, start))
    np.testing.assert_allclose(padded, alone, atol=2e-6)


def test_pairs_in_one_row_score_as_apart(params):
    chosen, rejected = row(10, 12), row(8, 12)
    rejected["tokens"][0, 6:8] = 50, 51  # the first six tokens are shared
    batch = {name: np.stack([chosen[name], rejected[name]], axis=1) for name in chosen}
    pair = (chosen["tokens"][0, :10], rejected["tokens"][0, :8])
    joint = {**batch, **join([pair], 16, 12, 1, 0)}
    found = [np.asarray(raw_output(params["head"], last_hidden(MODEL, params, b))) for b in (batch, joint)]
    assert found[0].shape == (1, 2)
    np.testing.assert_allclose(found[1], found[0], atol=2e-6)


def test_values_are_aligned_with_the_tokens_they_expect(params):
    """The value at t is read before token t is known: changing that token changes only the values after it."""
    values = jax.jit(lambda b: token_values(MODEL, params, params["head"], b))
    one, other = row(10, 10), row(10, 10)
    other["tokens"][0, 6] = 40
    before, after = values(one), values(other)
    np.testing.assert_array_equal(before[0, 0], 0)
    np.testing.assert_allclose(before[0, :7], after[0, :7], atol=1e-6)
    assert (np.abs(np.asarray(before - after)[0, 7:]) > 1e-4).all()


def test_a_new_head_has_the_published_spread():
    weight = np.asarray(draw_head(0, 4095)["weight"])
    assert weight.std() == pytest.approx(4096**-0.5, rel=0.05)
    assert abs(weight.mean()) < 3 / 4096**0.5 / 64
    assert not np.array_equal(weight, draw_head(1, 4095)["weight"])


def test_normalised_outputs_have_mean_0_and_deviation_1(params):
    sequences = [list(range(5, 5 + n)) for n in range(4, 24)]
    raw = Scorer(MODEL, params, 8)(sequences)
    head = normalised(params["head"], raw)
    found = Scorer(MODEL, {**params, "head": head}, 8)(sequences)
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-5)
    np.testing.assert_allclose(np.argsort(found), np.argsort(raw))
    flat = normalised(params["head"], np.full(4, 2.5, np.float32))
    assert (float(flat["scale"]), float(flat["bias"])) == (1.0, -2.5)


def test_a_scorer_gives_each_sequence_its_own_score_in_any_order_and_batch(params):
    sequences = [list(range(5, 5 + n)) for n in (20, 3, 11, 7, 16)]
    together = Scorer(MODEL, params, 4)(sequences)
    apart = [float(Scorer(MODEL, params, 2, n_time=32)([one])[0]) for one in sequences]
    np.testing.assert_allclose(together, apart, atol=2e-6)
