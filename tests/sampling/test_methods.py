"""What the methods draw, against the exact distribution worked out in numpy with a full sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from rlhf.errors import ConfigError
from rlhf.sampling.draw import CANDIDATES, candidates, draw
from rlhf.sampling.methods import Greedy, Method, Numbers, Sample, numbers_of
from rlhf.sampling.rules import Rules, Seen, restrict
from rlhf.sampling.search import is_kept, search_bounds

DRAW = jax.jit(draw)
N_DRAWS = 20_000
LOGITS = np.random.default_rng(5).normal(0, 2, 40).astype(np.float32)

METHODS = [
    Sample(),
    Sample(temperature=0.6),
    Sample(temperature=1.7),
    Sample(top_k=7),
    Sample(top_p=0.8),
    Sample(min_p=0.1),
    Sample(temperature=1.5, top_k=12, top_p=0.7),
    Sample(temperature=1.3, top_k=20, min_p=0.08),
    Sample(temperature=1.2, top_p=0.95, min_p=0.02),
    Sample(temperature=2.0, top_k=25, top_p=0.9, min_p=0.05),
]


def exact(method: Sample, logits: np.ndarray) -> np.ndarray:
    """Probability of every token: temperature, then top-k, top-p of what is left, min-p; renormalised."""
    p = np.exp((logits - logits.max()).astype(np.float64) / method.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    floor = method.min_p * p.max()
    if method.top_k:
        p[order[int(method.top_k) :]] = 0
        p /= p.sum()
        floor = method.min_p * p.max()
    share_before = np.cumsum(p[order]) - p[order]
    p[order[share_before >= method.top_p]] = 0
    p[p < floor] = 0
    return p / p.sum()


def tiled(method: Method, n: int) -> Numbers:
    return Numbers(*(np.repeat(x, n) for x in numbers_of([method])))


def draws(method: Method, logits: np.ndarray, n: int = N_DRAWS, seed: int = 0):
    uniforms = np.random.default_rng(seed).random((n, 2), np.float32)
    rows = jnp.tile(jnp.asarray(logits)[None], (n, 1))
    drawn = DRAW(tiled(method, n), rows, uniforms)
    return np.asarray(drawn.tokens), np.asarray(drawn.filtered_logprobs)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_draws_follow_the_exact_distribution(method):
    tokens, logprobs = draws(method, LOGITS)
    p = exact(method, LOGITS)
    counts = np.bincount(tokens, minlength=len(p))
    assert not counts[p == 0].any()
    np.testing.assert_allclose(np.exp(logprobs), p[tokens], rtol=1e-4)
    is_common = p * N_DRAWS >= 5
    observed = np.append(counts[is_common], counts[~is_common].sum())
    wanted = np.append(p[is_common], p[~is_common].sum()) * N_DRAWS
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert len(wanted) >= 3
    assert chisquare(observed, wanted).pvalue > 0.001


def test_filters_really_cut():
    """The distributions of the test above differ from one another, so that a filter that does nothing would be seen."""
    kept = {str(m): int((exact(m, LOGITS) > 0).sum()) for m in METHODS}
    assert kept[str(METHODS[0])] == 40
    assert kept[str(METHODS[3])] == 7
    assert all(1 < kept[str(m)] < 40 for m in METHODS[3:])


@pytest.mark.parametrize("method", [Greedy(), Sample(temperature=0.0, top_p=0.5), Sample(top_k=1)], ids=str)
def test_greedy_in_three_ways(method):
    tokens, logprobs = draws(method, LOGITS, 20)
    assert (tokens == LOGITS.argmax()).all()
    assert (logprobs == 0).all()


def test_temperature_alone_samples():
    assert len(set(draws(Sample(temperature=1.0), LOGITS, 200)[0])) > 5


def test_a_very_low_temperature_is_greedy_without_overflow():
    tokens, logprobs = draws(Sample(temperature=1e-30, top_k=5), LOGITS, 20)
    assert (tokens == LOGITS.argmax()).all()
    np.testing.assert_allclose(logprobs, 0)


@pytest.mark.parametrize("method", [Sample(), Sample(top_k=30), Sample(top_p=0.99)], ids=str)
def test_a_logit_of_minus_infinity_is_never_drawn(method):
    logits = LOGITS.copy()
    logits[np.argsort(-logits)[:3]] = -np.inf
    tokens, logprobs = draws(method, logits, 1000)
    assert np.isfinite(logits[tokens]).all()
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("method", [Sample(top_p=0.1), Sample(top_k=100)], ids=str)
def test_of_equal_tokens_the_first_are_kept(method):
    """Of 1000 equal tokens 100 make 10 %, more than the candidates that are looked at first."""
    tokens, logprobs = draws(method, np.zeros(1000, np.float32), 3000)
    assert set(tokens) == set(range(100))
    np.testing.assert_allclose(logprobs, -np.log(100), rtol=1e-5)


WIDE = np.random.default_rng(7).normal(0, 1.5, 600).astype(np.float32)
BEYOND = [
    Sample(top_k=100),
    Sample(top_k=500),
    Sample(top_p=0.9),
    Sample(top_k=300, top_p=0.8),
    Sample(temperature=1.6, top_p=0.95, min_p=0.005),
    Sample(temperature=2.0, top_k=599, top_p=0.99),
]


@pytest.mark.parametrize("method", BEYOND, ids=str)
def test_filters_that_keep_more_than_the_candidates_are_exact(method):
    """Each kept token comes up about as often as it should, no other does, and the log-probabilities say so."""
    p = exact(method, WIDE)
    assert (p > 0).sum() > CANDIDATES
    tokens, logprobs = draws(method, WIDE)
    np.testing.assert_allclose(np.exp(logprobs), p[tokens], rtol=1e-3)
    order = np.argsort(-p)
    groups = np.array_split(order[p[order] > 0], 25)
    counts = np.bincount(tokens, minlength=len(p))
    assert counts[p == 0].sum() == 0
    wanted = np.array([p[g].sum() for g in groups])
    assert chisquare([counts[g].sum() for g in groups], wanted / wanted.sum() * N_DRAWS).pvalue > 0.001


@pytest.mark.parametrize(
    "method",
    [Sample(repetition_penalty=1.8, temperature=0.9), Sample(repetition_penalty=1.3, top_k=9, top_p=0.9)],
    ids=str,
)
@pytest.mark.parametrize("is_too_short", [False, True], ids=["any length", "no end yet"])
def test_draws_under_penalty_bias_and_minimum_length(method, is_too_short):
    """The rules of a call change the logits first; what is drawn then follows the exact distribution of these."""
    held, bias = [3, 17, 17, 30], np.zeros(40, np.float32)
    bias[[1, 5, 9]] = [2.0, -1.5, -np.inf]
    logits = LOGITS.copy()
    for i in set(held):
        logits[i] = logits[i] / method.repetition_penalty if logits[i] > 0 else logits[i] * method.repetition_penalty
    logits += bias
    stops = np.argsort(-logits)[:2]
    if is_too_short:
        logits[stops] = -np.inf
    rules = Rules(jnp.asarray(bias), jnp.zeros(40, bool).at[stops].set(True), jnp.asarray(False))
    uniforms = np.random.default_rng(2).random((N_DRAWS, 2), np.float32)
    tokens, logprobs = (np.asarray(x) for x in restricted_draws(rules, tiled(method, N_DRAWS), uniforms, is_too_short))
    p = exact(method, logits)
    assert not np.bincount(tokens, minlength=40)[p == 0].any()
    np.testing.assert_allclose(np.exp(logprobs), p[tokens], rtol=1e-4)
    is_common = p * N_DRAWS >= 5
    counts = np.bincount(tokens, minlength=40)
    observed = np.append(counts[is_common], counts[~is_common].sum())
    wanted = np.append(p[is_common], p[~is_common].sum()) * N_DRAWS
    assert chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 0.001


@jax.jit
def restricted_draws(rules, numbers, uniforms, is_too_short):
    """Draws for rows whose prompt holds 3, 17 and 30 (and a 17 more), which padding follows."""
    rows = jnp.tile(jnp.asarray(LOGITS)[None], (N_DRAWS, 1))
    prompts, n = jnp.tile(jnp.array([[3, 17, 1]]), (N_DRAWS, 1)), jnp.full(N_DRAWS, 2)
    answers = jnp.tile(jnp.array([[17, 30, 5]]), (N_DRAWS, 1))
    allowed = restrict(rules, numbers, rows, jnp.full(N_DRAWS, is_too_short), Seen(prompts, n, answers, n))
    return draw(numbers, allowed, uniforms)


def test_the_bounds_are_those_of_a_sort():
    methods = BEYOND[:2] + BEYOND[3:4]
    numbers = numbers_of(methods)
    logits = jnp.tile(WIDE[None], (len(methods), 1))
    bounds = jax.jit(search_bounds)(numbers, logits, logits.max(axis=-1))
    kept = np.asarray(is_kept(logits, jnp.arange(len(WIDE))[None], bounds))
    for row, method in zip(kept, methods, strict=True):
        np.testing.assert_array_equal(row, exact(method, WIDE) > 0)


def test_a_row_does_not_depend_on_the_methods_beside_it():
    """Rows that need the whole vocabulary, the candidates, or no draw, in one batch and alone: bit for bit."""
    methods = [Sample(), Sample(top_k=5), Sample(top_p=0.9), Greedy(), Sample(top_k=700), Sample(min_p=0.2)]
    uniforms = np.random.default_rng(3).random((len(methods), 2), np.float32)
    logits = jnp.asarray(np.random.default_rng(4).normal(0, 2, (len(methods), 3000)).astype(np.float32))
    together = DRAW(numbers_of(methods), logits, uniforms)
    for row, method in enumerate(methods):
        alone = DRAW(tiled(method, len(methods)), logits, uniforms)
        assert alone.tokens[row] == together.tokens[row]
        assert alone.filtered_logprobs[row] == together.filtered_logprobs[row]


@pytest.mark.parametrize("vocab", [50, 1024, 4096, 6007, 65_536])
def test_candidates_are_the_largest(vocab):
    logits = jnp.asarray(np.random.default_rng(vocab).normal(0, 1, (3, vocab)).astype(np.float32))
    n = min(CANDIDATES, vocab)
    values, ids = jax.jit(candidates, static_argnums=1)(logits, n)
    wanted = np.sort(np.asarray(logits), axis=-1)[:, ::-1][:, :n]
    np.testing.assert_array_equal(values, wanted)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(logits), np.asarray(ids), axis=1), wanted)


def test_one_program_for_all_numbers():
    traces = []

    @jax.jit
    def run(numbers, logits, uniforms):
        traces.append(1)
        return draw(numbers, logits, uniforms)

    for method in [*METHODS, Greedy(), Sample(top_k=jnp.float32(3))]:
        run(tiled(method, 2), jnp.asarray(LOGITS)[None].repeat(2, 0), np.full((2, 2), 0.5, np.float32))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 of Sample must be at least 0"),
        ({"top_k": -1}, "top_k=-1 of Sample must be at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 of Sample must be above 0"),
        ({"top_k": 2.5}, "top_k=2.5 of Sample must be a whole number"),
        ({"top_p": 0.0}, "top_p=0.0 of Sample must be at most 1 and above 0"),
        ({"min_p": 1.5}, "min_p=1.5 of Sample must be at least 0 and at most 1"),
    ],
    ids=str,
)
def test_impossible_numbers_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sample(**settings)
