"""The cached decoder against the reference's continuations and against the model without a cache."""

import dataclasses

import jax
import numpy as np
import pytest
from reference_models import load_reference

from rlhf.errors import ConfigError, DataError
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.sharding import make_mesh, place
from rlhf.sampling.generate import generate
from rlhf.sampling.methods import Greedy, Sample
from rlhf.sampling.shapes import Shape, bucket

KEY = jax.random.key(11)
SHAPE = Shape(entries=6, lanes=1, prompt_tokens=32, new_tokens=16)  # one compilation for most of these tests
LONG = Shape(entries=6, lanes=1, prompt_tokens=32, new_tokens=48)
SMALL = Architecture(
    vocab_size=64,
    width=32,
    ff_width=48,
    layers=3,
    heads=4,
    kv_heads=2,
    head_width=8,
    query_scale=8**-0.5,
    window=5,
    pattern=2,
)


@pytest.fixture(scope="module")
def small():
    model = Gemma3(SMALL)
    return model, {"model": jax.device_put(model.initialise(0))}


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 64, n).tolist() for n in lengths]


def run(small, prompts, **settings):
    defaults = {"method": Sample(), "max_new_tokens": 12, "key": KEY, "stop_ids": (), "shape": SHAPE}
    return generate(*small, prompts, **{**defaults, **settings})


def recompute(model, params, prompts, generation, temperature):
    """Log-probabilities of the generated tokens by the trainer's function, without a cache."""
    rows = [(*p, *g[:n]) for p, g, n in zip(prompts, generation.tokens, generation.n_tokens, strict=True)]
    width = max(map(len, rows))
    batch = {name: np.zeros((len(rows), width), np.int32) for name in ("tokens", "segments", "positions")}
    for i, row in enumerate(rows):
        for name, values in (("tokens", row), ("segments", 1), ("positions", np.arange(len(row)))):
            batch[name][i, : len(row)] = values
    scores = np.asarray(jax.jit(model.token_logprobs)(params, batch, temperature))
    return [s[len(p) : len(row)] for s, p, row in zip(scores, prompts, rows, strict=True)]


@pytest.mark.parametrize("method", [Sample(temperature=0.7), Sample(temperature=1.4, top_k=5)], ids=str)
def test_logprobs_equal_the_trainers_far_past_the_window(shared, method):
    """30 to 64 tokens and a window of 8: every local layer has long lost the prompt."""
    a, params, _ = load_reference(shared / "fixtures" / "gemma3_tiny_text_rope8")
    model, prompts = Gemma3(a), prompts_of((24, 3, 17, 1, 9))
    generation = run((model, params), prompts, method=method, max_new_tokens=40, shape=LONG)
    again = recompute(model, params, prompts, generation, method.temperature)
    for i, logprobs in enumerate(again):
        assert len(logprobs) == 40
        np.testing.assert_allclose(generation.logprobs[i], logprobs, atol=1e-4)
    if method.top_k:
        assert (generation.filtered_logprobs > generation.logprobs).all()
    else:
        np.testing.assert_allclose(generation.filtered_logprobs, generation.logprobs, atol=1e-4)


def test_bfloat16_decoding_stays_near_the_trainers_numbers(small):
    model = dataclasses.replace(small[0], compute_dtype="bfloat16")
    prompts = prompts_of((9, 4))
    generation = run((model, small[1]), prompts, max_new_tokens=16)
    again = np.array(recompute(model, small[1], prompts, generation, 1.0))
    assert np.abs(generation.logprobs - again).max() < 0.15


def test_a_row_ends_at_its_first_stop_token(small):
    prompts = prompts_of((6, 9, 4))
    free = run(small, prompts, max_new_tokens=14)
    stop = int(free.tokens[1, 5])
    stopped = run(small, prompts, max_new_tokens=14, stop_ids=(stop, 10_000))
    for before, after, n, finished, answer in zip(
        free.tokens, stopped.tokens, stopped.n_tokens, stopped.is_finished, stopped.answers(), strict=True
    ):
        places = np.flatnonzero(before == stop)
        assert finished == bool(len(places))
        assert n == (places[0] + 1 if finished else 14)
        np.testing.assert_array_equal(after[:n], before[:n])
        assert not after[n:].any()
        assert answer == before[: n - finished].tolist()
    assert stopped.is_finished[1]
    assert not stopped.is_finished.all()
    assert stopped.finish_reasons[1] == "stop"
    assert not stopped.logprobs[1, stopped.n_tokens[1] :].any()


def test_the_loop_ends_when_all_rows_are_done(small):
    """Everything is a stop token: one token each, however long the answer might be."""
    generation = run(small, prompts_of((3, 5)), max_new_tokens=16, stop_ids=range(64))
    assert generation.n_tokens.tolist() == [1, 1]
    assert generation.is_finished.all()
    assert generation.answers() == [[], []]


def test_forbidden_tokens_never_come_and_do_not_change_the_logprobs(small):
    prompts = prompts_of((8, 5))
    forbidden = tuple(range(32))
    generation = run(small, prompts, forbidden_ids=forbidden, max_new_tokens=16)
    assert generation.tokens.min() >= 32
    for i, logprobs in enumerate(recompute(*small, prompts, generation, 1.0)):
        np.testing.assert_allclose(generation.logprobs[i], logprobs, atol=1e-4)
    assert (generation.filtered_logprobs > generation.logprobs).all()
    assert run(small, prompts, forbidden_ids=forbidden, method=Greedy()).tokens.min() >= 32


def test_a_row_draws_the_same_alone_in_a_batch_and_shuffled(small):
    prompts = prompts_of((7, 30, 3, 12, 19))
    together = run(small, prompts)
    order = [3, 0, 4, 2, 1]
    shuffled = run(small, [prompts[i] for i in order], rows=order)
    np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
    np.testing.assert_array_equal(shuffled.logprobs, together.logprobs[order])
    for i, prompt in enumerate(prompts):
        alone = run(small, [prompt], rows=[i])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        np.testing.assert_array_equal(alone.logprobs[0], together.logprobs[i])  # same shape: bit for bit
    other_shape = run(small, prompts[2:4], rows=[2, 3], shape=None)
    np.testing.assert_array_equal(other_shape.tokens, together.tokens[2:4])
    np.testing.assert_allclose(other_shape.logprobs, together.logprobs[2:4], atol=1e-5)


def test_noise_differs_by_key_row_sample_and_position(small):
    prompt = prompts_of((6,))[0]
    one = run(small, [prompt] * 3, max_new_tokens=16)
    assert len({tuple(row) for row in one.tokens}) == 3
    np.testing.assert_array_equal(run(small, [prompt] * 3, max_new_tokens=16).tokens, one.tokens)
    other = run(small, [prompt] * 3, max_new_tokens=16, key=jax.random.key(12))
    assert (other.tokens != one.tokens).any(axis=1).all()
    group = run(small, [prompt], n=4, max_new_tokens=16)
    assert len({tuple(row) for row in group.tokens}) == 4


def test_samples_of_a_group(small):
    """Row i n + j is sample j of prompt i; the first sample is what n = 1 gives."""
    prompts = prompts_of((5, 14, 9))
    group = run(small, prompts, n=4)
    assert group.tokens.shape == (12, 12)
    for i, logprobs in enumerate(recompute(*small, [p for p in prompts for _ in range(4)], group, 1.0)):
        np.testing.assert_allclose(group.logprobs[i], logprobs, atol=1e-4)
    np.testing.assert_array_equal(group.tokens[::4], run(small, prompts).tokens)


def test_fewer_tokens_are_a_prefix(small):
    prompts = prompts_of((5, 8))
    short, long = run(small, prompts, max_new_tokens=3), run(small, prompts, max_new_tokens=16)
    assert short.tokens.shape == (2, 3)
    np.testing.assert_array_equal(short.tokens, long.tokens[:, :3])


@pytest.mark.slow  # compiles every operation by itself
def test_the_unjitted_run_is_the_same(small):
    prompts = prompts_of((4, 2))
    with jax.disable_jit():
        eager = run(small, prompts, max_new_tokens=2, method=Sample(top_k=9))
    np.testing.assert_array_equal(eager.tokens, run(small, prompts, max_new_tokens=2, method=Sample(top_k=9)).tokens)


def test_buckets():
    assert [bucket(n, 16) for n in (1, 16, 17, 24, 25, 33, 48, 49, 65, 97)] == [16, 16, 24, 24, 32, 48, 48, 64, 96, 128]
    assert [bucket(n, 1) for n in (1, 2, 3, 4, 5, 7, 9, 13)] == [1, 2, 3, 4, 6, 8, 12, 16]
    for n in range(1, 3000):
        assert n <= bucket(n, 1) <= max(n * 1.5, 2)


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "message"),
    [
        ([], {}, DataError, "there is no prompt to continue"),
        ([[2, 5], []], {}, DataError, "prompt 1 is empty"),
        ([[2, 64]], {}, DataError, "prompt 0 holds token 64, and the model's vocabulary ends at 63"),
        ([[2, -1]], {}, DataError, "prompt 0 holds token -1"),
        ([[2]], {"n": 0}, ConfigError, "n=0 must be at least 1"),
        ([[2]], {"max_new_tokens": 0}, ConfigError, "max_new_tokens=0 must be at least 1"),
        ([[2]], {"forbidden_ids": range(64)}, ConfigError, "nothing is left to generate"),
        ([[2]], {"rows": [1, 2]}, DataError, "1 prompts need as many row numbers, not 2"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(small, prompts, settings, error, message):
    with pytest.raises(error, match=message):
        run(small, prompts, **settings)


MESHES = [(1, 1, 8), (2, 2, 2)]


@pytest.fixture(scope="module")
def alone():
    """A model of one local and one global layer, prompts, and what one device makes of them."""
    model = Gemma3(dataclasses.replace(SMALL, layers=2, heads=8, kv_heads=8))
    params, prompts = {"model": jax.device_put(model.initialise(0))}, prompts_of((9, 4, 17))
    shape = Shape(entries=8, lanes=1, prompt_tokens=32, new_tokens=16)
    return model, params, prompts, shape, run((model, params), prompts, shape=shape)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_parameters_spread_over_a_mesh_give_the_same(alone, sizes):
    model, params, prompts, shape, expected = alone
    spread = place(params, make_mesh(*sizes))
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(spread))
    generation = run((model, spread), prompts, shape=shape)
    np.testing.assert_array_equal(generation.tokens, expected.tokens)
    np.testing.assert_allclose(generation.logprobs, expected.logprobs, atol=1e-5)
