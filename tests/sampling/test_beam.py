"""Beam search against trying every answer."""

import itertools

import jax
import numpy as np
import pytest

from rlhf.errors import ConfigError
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.sampling.beam import beam_search
from rlhf.sampling.generate import generate
from rlhf.sampling.methods import Beam, Greedy

VOCAB, DEPTH, STOP = 6, 3, 1
TINY = Architecture(
    vocab_size=VOCAB, width=16, ff_width=24, layers=2, heads=2, kv_heads=1, head_width=8, query_scale=0.5, window=4
)


@pytest.fixture(scope="module")
def tiny():
    model = Gemma3(TINY)
    params = jax.device_put(model.initialise(3))
    params["embedding"] *= 3  # far from uniform
    return model, {"model": params}


def search(tiny, prompts, width, length_penalty, **settings):
    method = Beam(width=width, length_penalty=length_penalty)
    return beam_search(*tiny, prompts, method=method, **{"max_new_tokens": DEPTH, "stop_ids": (STOP,), **settings})


def every_answer():
    for n in range(1, DEPTH + 1):
        for ids in itertools.product(range(VOCAB), repeat=n):
            if STOP not in ids[:-1] and (n == DEPTH or ids[-1] == STOP):
                yield ids


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_wide_search_finds_the_best_of_all_answers(tiny, length_penalty):
    prompts = [[2, 4, 5], [2], [3, 3, 4, 0, 2]]
    found = search(tiny, prompts, VOCAB**2, length_penalty)
    model, params = tiny
    answers = list(every_answer())
    for i, prompt in enumerate(prompts):
        tokens = np.zeros((len(answers), len(prompt) + DEPTH), np.int32)
        for row, ids in enumerate(answers):
            tokens[row, : len(prompt) + len(ids)] = (*prompt, *ids)
        positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(answers), 1))
        batch = {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}
        scores = np.asarray(jax.jit(model.token_logprobs)(params, batch))[:, len(prompt) :]
        sums = [s[: len(ids)].sum() / len(ids) ** length_penalty for s, ids in zip(scores, answers, strict=True)]
        best = answers[int(np.argmax(sums))]
        assert tuple(found.tokens[i, : found.n_tokens[i]].tolist()) == best
        n = len(best)
        np.testing.assert_allclose(found.logprobs[i, :n], scores[int(np.argmax(sums)), :n], atol=1e-4)
        assert found.finish_reasons[i] == ("stop" if best[-1] == STOP else "length")


def test_one_beam_is_greedy(tiny):
    prompts = [[2, 4, 5], [2], [3, 3, 4, 0, 2]]
    settings = {"max_new_tokens": 9, "stop_ids": ()}
    found = search(tiny, prompts, 1, 1.0, **settings)
    greedy = generate(*tiny, prompts, method=Greedy(), key=jax.random.key(0), **settings)
    np.testing.assert_array_equal(found.tokens, greedy.tokens)


def test_prompts_do_not_change_each_other(tiny):
    """Also when they wait for their turn."""
    prompts = [[2, 4, 5], [2], [3, 3, 4, 0, 2], [5], [4, 2]]
    settings = {"max_new_tokens": 9, "forbidden_ids": (0,)}
    together = search(tiny, prompts, 3, 1.0, slots=6, **settings)
    assert not (together.tokens[:, :1] == 0).any()
    for i, prompt in enumerate(prompts):
        alone = search(tiny, [prompt], 3, 1.0, slots=6, **settings)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])


def test_wider_beams_find_no_worse(tiny):
    prompts = [[2, 4, 5], [3, 3, 4, 0, 2]]
    settings = {"max_new_tokens": 6, "stop_ids": ()}
    sums = [search(tiny, prompts, width, 1.0, **settings).logprobs.sum(axis=1) for width in (1, 6)]
    assert (sums[1] >= sums[0] - 1e-5).all()


def test_more_beams_than_places_are_refused(tiny):
    with pytest.raises(ConfigError, match="width=37 of Beam must be at most 36, the answers written at once"):
        search(tiny, [[2]], 37, 1.0, slots=36)
    with pytest.raises(ConfigError, match="Beam searches and does not draw"):
        generate(*tiny, [[2]], method=Beam(), max_new_tokens=3, key=jax.random.key(0), stop_ids=())
