"""Supervised fine-tuning against a reference implementation's losses, given the same token log-probabilities."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference_models import load_reference

from rlhf.algorithms.sft import SFT
from rlhf.model.gemma3 import Gemma3
from rlhf.ops.likelihood import Dynamic, NegativeLogLikelihood


class Recorded:
    """A model that returns log-probabilities computed elsewhere."""

    def token_logprobs(self, params, batch, temperature=1.0):
        return params["model"]


TOKEN_LOSSES = {"nll": NegativeLogLikelihood(), "dft": Dynamic()}


def case(shared, kind: str, labels: str) -> tuple[dict, np.ndarray, SFT]:
    """Recorded numbers, the mask of the tokens that count, and the algorithm."""
    recorded = np.load(shared / "fixtures/gemma3_tiny_text/expected.npz")
    cases = json.loads((shared / "fixtures/losses/expected.json").read_text())["sft"]["cases"]
    expected = next(one for one in cases if (one["loss_type"], one["labels"]) == (kind, labels))
    masks = {
        "all": recorded["attention_mask"] > 0,
        "completion_only": np.load(shared / "fixtures/losses/inputs.npz")["sft_completion_mask"] > 0,
    }
    is_answer = masks[labels].copy()
    is_answer[:, 0] = False  # nothing predicts the first token
    return expected, is_answer, SFT(learning_rate=2e-5, batch_size=3, microbatch_size=1, token_loss=TOKEN_LOSSES[kind])


@pytest.mark.parametrize("labels", ["all", "completion_only"])
@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_loss(kind, labels, shared):
    expected, is_answer, sft = case(shared, kind, labels)
    recorded = np.load(shared / "fixtures/gemma3_tiny_text/expected.npz")
    params = {"model": jnp.asarray(recorded["token_logprobs"])}
    prepared = sft.prepare(None, params, {"is_answer": is_answer}, jax.random.key(0))
    loss, metrics = sft.loss(Recorded(), params, prepared)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    if kind == "nll":
        assert metrics["nll"] == loss


@pytest.mark.parametrize("labels", ["all", "completion_only"])
@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_gradient_through_the_model(kind, labels, shared):
    expected, is_answer, sft = case(shared, kind, labels)
    architecture, params, recorded = load_reference(shared / "fixtures/gemma3_tiny_text")
    is_real = recorded["attention_mask"].astype(np.int32)
    batch = {"tokens": recorded["input_ids"].astype(np.int32), "segments": is_real, "is_answer": is_answer}
    batch["positions"] = np.maximum(np.cumsum(is_real, axis=1) - 1, 0).astype(np.int32)
    prepared = {k: jnp.asarray(v) for k, v in sft.prepare(None, params, batch, jax.random.key(0)).items()}
    gradient = jax.jit(jax.grad(lambda p: sft.loss(Gemma3(architecture), p, prepared)[0]))(params)
    np.testing.assert_allclose(optax.tree.norm(gradient), expected["grad_norm_total"], rtol=1e-4)
    norm = jnp.linalg.norm(gradient["model"]["embedding"])
    np.testing.assert_allclose(norm, expected["grad_norm_embed"], rtol=1e-4)
