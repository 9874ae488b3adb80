"""A pair in one row gives what two rows give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.data.arithmetic import Arithmetic
from rlhf.data.batches import collate
from rlhf.data.joint import join, joint_length, n_shared
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.tokenizer import Tokenizer


def ids(*numbers):
    return np.array(numbers, np.int32)


def test_by_hand():
    pair = ids(2, 5, 7, 8), ids(2, 5, 9)
    assert n_shared(pair) == 2
    assert joint_length(pair) == 5
    batch = join([pair], n_joint=6, n_time=4, batch_size=1, pad=0)
    assert batch["joint_tokens"][0].tolist() == [2, 5, 7, 8, 9, 0]
    assert batch["joint_segments"][0].tolist() == [1, 1, 2, 2, 3, 0]
    assert batch["joint_positions"][0].tolist() == [0, 1, 2, 3, 2, 0]
    assert batch["joint_prefixes"][0].tolist() == [0, 0, 1, 1, 1, 0]
    assert batch["joint_previous"][0].tolist() == [-1, 0, 1, 2, 1, -1]
    assert batch["joint_places"][0].tolist() == [[0, 1, 2, 3], [0, 1, 4, -1]]


@pytest.mark.parametrize(
    "pair",
    [
        (ids(2, 5, 7), ids(2, 5, 7)),
        (ids(2, 5), ids(2, 5, 7)),
        (ids(3, 5), ids(2, 5)),
    ],
    ids=["equal", "one inside the other", "nothing shared"],
)
def test_every_token_has_its_place_and_its_predecessor(pair):
    batch = join([pair], n_joint=8, n_time=4, batch_size=1, pad=0)
    for side, tokens in enumerate(pair):
        places = batch["joint_places"][0, side, : len(tokens)]
        assert batch["joint_tokens"][0, places].tolist() == tokens.tolist()
        assert batch["joint_positions"][0, places].tolist() == list(range(len(tokens)))
        assert batch["joint_previous"][0, places].tolist() == [-1, *places[:-1].tolist()]


@pytest.mark.parametrize("form", [{}, {"scan_layers": False}], ids=["scan", "layers"])
def test_model_gives_the_same_numbers_and_gradients(form):
    tokenizer = Tokenizer()
    examples = Arithmetic(max_length=128, n_train=32).load("train", "preference", tokenizer)
    assert examples.n_joint == 112
    assert examples.n_time == 80
    batch = collate(examples, range(6))
    separate = {name: x for name, x in batch.items() if not name.startswith("joint_") and name != "scored"}
    all_scored = {name: x for name, x in batch.items() if name != "scored"}
    model = Gemma3(Architecture(tokenizer.n_vocab, 32, 48, 2, 2, 1, 16, 0.25, 24, pattern=2), **form)
    params = {"model": jax.device_put(model.initialise(0), may_alias=False)}
    weight = jnp.asarray(np.random.default_rng(0).normal(size=batch["tokens"].shape) * batch["is_answer"], jnp.float32)

    def total(p, rows):
        logprobs = model.token_logprobs(p, rows)
        return jnp.sum(weight * logprobs), logprobs

    differentiate = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, theirs), expected = differentiate(params, separate)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for one, is_seen in ((all_scored, 1), (batch, batch["is_answer"])):
        (_, ours), gradient = differentiate(params, one)
        np.testing.assert_allclose(ours, theirs * is_seen, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), gradient, expected)


def test_long_answers_after_short_prompts_stay_apart():
    """Where a joint row would save too little, none is made."""
    data = Arithmetic(max_length=128, n_train=8, share_prompt=False)
    assert data.load("train", "preference", Tokenizer()).n_joint is None
