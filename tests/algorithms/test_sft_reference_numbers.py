"""Supervised fine-tuning against a reference implementation's losses, given the same token log-probabilities."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.algorithms.sft import SFT


class Recorded:
    """A model that returns log-probabilities computed elsewhere."""

    def token_logprobs(self, params, batch, temperature=1.0):
        return params["model"]


@pytest.mark.parametrize("labels", ["all", "completion_only"])
def test_sft(labels, shared):
    recorded = np.load(shared / "fixtures/gemma3_tiny_text/expected.npz")
    cases = json.loads((shared / "fixtures/losses/expected.json").read_text())["sft"]["cases"]
    expected = next(case for case in cases if (case["loss_type"], case["labels"]) == ("nll", labels))
    masks = {
        "all": recorded["attention_mask"] > 0,
        "completion_only": np.load(shared / "fixtures/losses/inputs.npz")["sft_completion_mask"] > 0,
    }
    is_answer = masks[labels].copy()
    is_answer[:, 0] = False  # nothing predicts the first token
    sft = SFT(learning_rate=2e-5, batch_size=3, microbatch_size=1)
    params = {"model": jnp.asarray(recorded["token_logprobs"])}
    prepared = sft.prepare(None, params, {"is_answer": is_answer}, jax.random.key(0))
    loss, metrics = sft.loss(Recorded(), params, prepared)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    assert metrics["nll"] == loss
