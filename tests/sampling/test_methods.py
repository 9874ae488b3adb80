"""What the methods draw, against the exact distribution worked out in numpy with a full sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from rlhf.errors import ConfigError
from rlhf.sampling.methods import CANDIDATES, Greedy, Sample, draw

N_DRAWS = 4000
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


def draws(method: Sample, logits: np.ndarray, n: int = N_DRAWS, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), n)
    rows = jnp.tile(jnp.asarray(logits)[None], (n, 1))
    drawn = jax.jit(draw)(method, rows, keys)
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
    tokens, logprobs = draws(method.as_sample(), LOGITS, 20)
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


def test_top_p_alone_chooses_among_the_candidates():
    """Shares are of the whole vocabulary: of 1000 equal tokens 100 make 10 %; at most CANDIDATES make any."""
    flat = np.zeros(1000, np.float32)
    few, logprobs = draws(Sample(top_p=0.1), flat, 3000)
    assert len(set(few)) == 100
    np.testing.assert_allclose(logprobs, -np.log(100), rtol=1e-5)
    many, logprobs = draws(Sample(top_p=0.9), flat, 9000)
    assert len(set(many)) == CANDIDATES
    np.testing.assert_allclose(logprobs, -np.log(CANDIDATES), rtol=1e-5)


def test_one_program_for_all_numbers():
    traces = []

    @jax.jit
    def run(method, logits, keys):
        traces.append(1)
        return draw(method, logits, keys)

    keys = jax.random.split(jax.random.key(0), 2)
    for method in METHODS:
        method = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), method)
        run(method, jnp.asarray(LOGITS)[None].repeat(2, 0), keys)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 of Sample must be at least 0"),
        ({"top_k": 257}, "top_k=257 of Sample must be at least 0 and at most 256"),
        ({"top_k": 2.5}, "top_k=2.5 of Sample must be a whole number"),
        ({"top_p": 0.0}, "top_p=0.0 of Sample must be at most 1 and above 0"),
        ({"min_p": 1.5}, "min_p=1.5 of Sample must be at least 0 and at most 1"),
    ],
    ids=str,
)
def test_impossible_numbers_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sample(**settings)
