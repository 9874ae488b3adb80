"""Continuous batching: who enters when changes no answer, and keeps the rows busy."""

import jax
import numpy as np
import pytest
from reference_models import load_reference
from test_generate import KEY, prompts_of, recompute, run, small  # noqa: F401

from rlhf.errors import ConfigError
from rlhf.model.gemma3 import Gemma3
from rlhf.sampling.methods import Greedy, Sample
from rlhf.sampling.shapes import Shape, bucket, shape_for

FEW = Shape(entries=3, lanes=2, prompt_tokens=32, new_tokens=16)


def test_answers_do_not_depend_on_the_order_of_refill(small):  # noqa: F811
    """Eleven prompts with two samples each through three entries, in two orders and alone: bit for bit."""
    prompts = prompts_of((5, 30, 1, 12, 19, 8, 3, 27, 14, 6, 22))
    settings = {"shape": FEW, "n": 2, "max_new_tokens": 14, "stop_ids": range(8)}
    together = run(small, prompts, **settings)
    assert len(set(together.n_tokens.tolist())) > 5  # they end at different times
    order = np.random.default_rng(0).permutation(11)
    shuffled = run(small, [prompts[i] for i in order], rows=order.tolist(), **settings)
    rows = (2 * order[:, None] + np.arange(2)).reshape(-1)
    for name in ("tokens", "logprobs", "filtered_logprobs", "n_tokens"):
        np.testing.assert_array_equal(getattr(shuffled, name), getattr(together, name)[rows])
    assert shuffled.finish_reasons == [together.finish_reasons[i] for i in rows]
    for i in (1, 6):
        alone = run(small, [prompts[i]], rows=[i], **settings)
        np.testing.assert_array_equal(alone.tokens, together.tokens[2 * i : 2 * i + 2])
        np.testing.assert_array_equal(alone.logprobs, together.logprobs[2 * i : 2 * i + 2])


def test_more_samples_than_lanes_are_those_of_a_wide_shape(small):  # noqa: F811
    prompts = prompts_of((5, 14))
    few = run(small, prompts, n=7, shape=FEW)
    wide = run(small, prompts, n=7, shape=None)
    np.testing.assert_array_equal(few.tokens, wide.tokens)
    np.testing.assert_allclose(few.logprobs, wide.logprobs, atol=1e-5)


def test_rows_are_refilled_while_others_write(small):  # noqa: F811
    """Every place in which no token was drawn is one of the last answers': batches of three would leave far more."""
    shape = Shape(entries=3, lanes=1, prompt_tokens=32, new_tokens=16)
    generation = run(small, prompts_of([6] * 24), shape=shape, max_new_tokens=14, stop_ids=range(12))
    lengths = generation.n_tokens
    static = sum(3 * lengths[i : i + 3].max() for i in range(0, 24, 3))
    places = lengths.sum() / generation.utilisation
    assert places < 0.8 * static
    assert places <= lengths.sum() + 2 * lengths.max()


def test_each_prompt_may_have_a_method_of_its_own(small):  # noqa: F811
    prompts = prompts_of((5, 8, 13, 4))
    methods = [Greedy(), Sample(temperature=0.7, top_k=5), Sample(), Sample(temperature=0.0, repetition_penalty=1.5)]
    mixed = run(small, prompts, method=methods)
    for i, method in enumerate(methods):
        alone = run(small, [prompts[i]], rows=[i], method=method)
        np.testing.assert_array_equal(alone.tokens[0], mixed.tokens[i])
        np.testing.assert_array_equal(alone.filtered_logprobs[0], mixed.filtered_logprobs[i])


@pytest.mark.parametrize("name", ["gemma3_tiny_text", "gemma3_tiny_text_rope8"])
def test_greedy_continuations_through_few_entries_after_ragged_calls(shared, name):
    """The reference's tokens also when prompts wait for each other, after 200 calls of other sizes and settings; the
    log-probabilities of all 40 are the trainer's, far past the window of 8."""
    a, params, expected = load_reference(shared / "fixtures" / name)
    prompts = [row[:n].tolist() for row, n in zip(expected["input_ids"], expected["lengths"], strict=True)]
    assert len({len(prompt) for prompt in prompts}) == 3
    model, rng = (Gemma3(a), params), np.random.default_rng(1)
    shape = Shape(entries=2, lanes=1, prompt_tokens=32, new_tokens=48)
    for step in range(200):
        some = prompts_of(rng.integers(1, 33, step % 5 + 1), seed=step)
        method = Sample(temperature=step % 3 / 2, top_k=step % 7)
        run(model, some, shape=shape, max_new_tokens=int(rng.integers(1, 5)), key=jax.random.key(step), method=method)
    order = [2, 0, 1, 2, 0, 1, 1]
    prompts = [prompts[i] for i in order]
    generation = run(model, prompts, method=Greedy(), shape=shape, max_new_tokens=40)
    np.testing.assert_array_equal(generation.tokens[:, :12], expected["greedy"][order])
    for logprobs, again in zip(generation.logprobs, recompute(*model, prompts, generation, 1.0), strict=True):
        np.testing.assert_allclose(logprobs, again, atol=1e-4)


def test_across_shapes_answers_are_the_same_but_for_rounding(small):  # noqa: F811
    """The share of rows that differ between buckets, of 96: none here; the bound is what a rare tie may cost."""
    prompts = prompts_of(np.random.default_rng(2).integers(1, 33, 96))
    one = run(small, prompts, shape=Shape(8, 1, 32, 16))
    other = run(small, prompts, shape=Shape(5, 1, 48, 24))
    differ = (one.tokens != other.tokens).any(axis=1).mean()
    assert differ <= 1 / 96


def test_the_shape_of_a_call():
    assert shape_for(5, 1, 20, 10) == Shape(6, 1, 24, 16)
    assert shape_for(4, 16, 256, 64) == Shape(4, 16, 256, 64)
    assert shape_for(32, 8, 100, 100, slots=64) == Shape(32, 2, 128, 128)
    assert shape_for(1000, 1, 10, 10, slots=16) == Shape(16, 1, 16, 16)
    assert shape_for(2, 100, 10, 10, slots=64) == Shape(2, 32, 16, 16)
    for prompts in range(1, 70):
        for n in (1, 3, 8, 33):
            shape = shape_for(prompts, n, 10, 10, slots=24)
            assert shape.rows <= 24
            assert shape.entries <= bucket(prompts, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 17}, "max_new_tokens=17, and the shape has room for 16"),
        ({"prompts": [[2] * 33]}, "a prompt has 33 tokens, and the shape has room for 32"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_given_shape_is_refused(small, settings, message):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        run(small, settings.pop("prompts", [[2]]), key=KEY, **settings)
