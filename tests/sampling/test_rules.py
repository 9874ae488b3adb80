"""Bias, penalty, minimum length, and what is reported of each token."""

import jax
import numpy as np
import pytest
from test_generate import prompts_of, run, small  # noqa: F401

from rlhf.errors import ConfigError
from rlhf.sampling.methods import Greedy, Sample
from rlhf.sampling.shapes import shape_for


def logits_of(small, rows):  # noqa: F811
    """float64 logits of each next token, without a cache; rows: token ids."""
    model, params = small
    width = max(map(len, rows))
    tokens, segments = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    positions = np.tile(np.arange(width, dtype=np.int32), (len(rows), 1))
    found = jax.jit(model.logits)(params, tokens, segments, positions)
    return [np.asarray(found[i, : len(row)], np.float64) for i, row in enumerate(rows)]


def contexts(prompts, generation):
    return [[*p, *g[:n]] for p, g, n in zip(prompts, generation.tokens, generation.n_tokens, strict=True)]


def test_the_repetition_penalty_counts_prompt_and_answer(small):  # noqa: F811
    """Greedy with a penalty equals a loop in numpy over logits without a cache."""
    prompts = prompts_of((9, 4))
    generation = run(small, prompts, method=Sample(temperature=0.0, repetition_penalty=1.4))
    plain = run(small, prompts, method=Greedy())
    assert (generation.tokens != plain.tokens).any()
    for prompt, row, logits in zip(
        prompts, generation.tokens, logits_of(small, contexts(prompts, generation)), strict=True
    ):
        for t, token in enumerate(row):
            own = logits[len(prompt) + t - 1]
            seen = sorted({*prompt, *row[:t].tolist()})
            own[seen] = np.where(own[seen] > 0, own[seen] / 1.4, own[seen] * 1.4)
            assert own.argmax() == token


def test_bias_moves_the_draw_and_not_the_logprobs(small):  # noqa: F811
    prompts = prompts_of((7, 3))
    bias = {11: 4.0, 12: -np.inf}
    generation = run(small, prompts, bias=bias, max_new_tokens=16)
    plain = run(small, prompts, max_new_tokens=16)
    assert (generation.tokens == 11).sum() > (plain.tokens == 11).sum()
    for prompt, row, drawn, filtered, logits in zip(
        prompts, generation.tokens, generation.logprobs, generation.filtered_logprobs,
        logits_of(small, contexts(prompts, generation)), strict=True,
    ):  # fmt: skip
        own = logits[len(prompt) - 1 : -1]
        places = np.arange(len(row))
        np.testing.assert_allclose(drawn, (own - np.logaddexp.reduce(own, axis=1)[:, None])[places, row], atol=1e-4)
        own[:, 11] += 4
        own[:, 12] = -np.inf
        np.testing.assert_allclose(filtered, (own - np.logaddexp.reduce(own, axis=1)[:, None])[places, row], atol=1e-4)


def test_no_stop_before_the_minimum_length(small):  # noqa: F811
    prompts = prompts_of((6, 9, 4, 12))
    stops = range(20)
    early = run(small, prompts, stop_ids=stops)
    assert early.n_tokens.min() < 6
    late = run(small, prompts, stop_ids=stops, min_new_tokens=6)
    assert late.n_tokens.min() >= 6
    for row, n, reason in zip(late.tokens, late.n_tokens, late.finish_reasons, strict=True):
        assert not np.isin(row[:6], stops).any() or n == 6
        assert (reason == "stop") == bool(np.isin(row[n - 1], stops))
        assert not np.isin(row[: n - 1], stops).any()


@pytest.mark.parametrize("method", [Sample(temperature=0.6), Greedy()], ids=str)
def test_entropies_and_alternatives(small, method):  # noqa: F811
    prompts = prompts_of((5, 11))
    shape = shape_for(2, 1, 11, 12, has_alternatives=True)
    generation = run(small, prompts, method=method, wants_entropy=True, n_alternatives=5, shape=shape)
    ids, logprobs = generation.likely
    assert ids.shape == logprobs.shape == (2, 12, 5)
    temperature = method.as_sample().temperature or 1.0
    for i, (prompt, logits) in enumerate(zip(prompts, logits_of(small, contexts(prompts, generation)), strict=True)):
        own = logits[len(prompt) - 1 : -1] / temperature
        own -= np.logaddexp.reduce(own, axis=1)[:, None]
        np.testing.assert_allclose(generation.entropies[i], -(np.exp(own) * own).sum(axis=1), atol=1e-4)
        order = np.argsort(-own, axis=1)[:, :5]
        np.testing.assert_array_equal(ids[i], order)
        np.testing.assert_allclose(logprobs[i], np.take_along_axis(own, order, axis=1), atol=1e-4)
    assert run(small, prompts).entropies is None
    assert run(small, prompts).likely is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": {64: 1.0}}, "bias names token 64, and the model's vocabulary ends at 63"),
        ({"bias": {3: float("nan")}}, "bias of token 3 is nan; it must be a number"),
        ({"bias": dict.fromkeys(range(64), -np.inf)}, "nothing is left to generate"),
        ({"min_new_tokens": 2, "stop_ids": range(64)}, "min_new_tokens=2 leaves nothing to draw"),
        ({"n_alternatives": 21}, "n_alternatives=21 must be from 0 to 20"),
    ],
    ids=str,
)
def test_impossible_rules_are_refused(small, settings, message):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        run(small, [[2]], **settings)
