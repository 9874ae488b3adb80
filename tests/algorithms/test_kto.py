"""KTO against numbers of a reference implementation, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table_model import MODEL, SHARED_LOSSES, random_params, runtime, unpaired_batch

from rlhf.algorithms.kto import KTO
from rlhf.algorithms.reference import NoReference, Precomputed, Synced
from rlhf.errors import ConfigError
from rlhf.ops.unpaired import APOZeroUnpaired, KahnemanTversky

SETTINGS = {"learning_rate": 1e-6, "batch_size": 8, "microbatch_size": 8}
EXPECTED = json.loads((SHARED_LOSSES / "expected.json").read_text())["kto"]["cases"] if SHARED_LOSSES.exists() else []
CASES = [pytest.param(case, id=case["id"]) for case in EXPECTED]
LOSSES = {"kto": KahnemanTversky(), "apo_zero_unpaired": APOZeroUnpaired()}
POLICY, REFERENCE = random_params(1), random_params(2)


def padded(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float32)
    return np.pad(values, ((0, 0), (1, 0))) if values.shape[1] == 13 else values


@pytest.fixture(scope="module")
def inputs(shared):
    return dict(np.load(shared / "fixtures/losses/inputs.npz"))


@pytest.fixture(scope="module")
def batch(inputs):
    """Words 0 to 111 are the tokens of the answers, 112 to 223 those of the mismatched ones: each its own word."""
    is_answer = inputs["dpo_completion_mask"] > 0
    tokens = np.arange(112, dtype=np.int32).reshape(8, 14)
    sequences = {"is_answer": is_answer, "segments": inputs["dpo_attention_mask"].astype(np.int32)}
    sequences["positions"] = np.broadcast_to(np.arange(14, dtype=np.int32), (8, 14))
    mismatched = {f"kl_{name}": value for name, value in sequences.items()}
    return {
        **sequences,
        **mismatched,
        "tokens": tokens,
        "kl_tokens": tokens + 112,
        "is_desirable": inputs["kto_labels"],
    }


def table(inputs, own: str, mismatched: str) -> dict:
    logprobs = np.concatenate([padded(inputs[own]).ravel(), padded(inputs[mismatched]).ravel()])
    return {"model": {"logprobs": jnp.asarray(logprobs)}}


@pytest.mark.parametrize("case", CASES or [pytest.param(None, marks=pytest.mark.skip(reason="needs `shared`"))])
def test_kto(case, inputs, batch, shared):
    kto = KTO(
        **SETTINGS,
        beta=case.get("beta", 0.1),
        preference=LOSSES[case["loss_type"]],
        desirable_weight=case.get("dw", 1.0),
        undesirable_weight=case.get("uw", 1.0),
    )
    params = table(inputs, "dpo_policy_logps", "kto_kl_policy_logps")
    reference = table(inputs, "dpo_ref_logps", "kto_kl_ref_logps")
    prepared = kto.prepare(runtime(reference), params, batch, jax.random.key(0))
    (loss, metrics), gradient = jax.value_and_grad(lambda p: kto.loss(MODEL, p, prepared), has_aux=True)(params)
    gradient = gradient["model"]["logprobs"]
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-5)
    np.testing.assert_array_equal(gradient[112:], 0)  # the KL estimate is a constant
    grads = np.load(shared / "fixtures/losses/grads.npz")[case["id"].replace("/", "|")]
    is_answer = batch["is_answer"][:, 1:]  # not masked there: compare answer tokens
    mine = np.asarray(gradient[:112]).reshape(8, 14)
    np.testing.assert_allclose(mine[:, 1:][is_answer], grads[is_answer], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mine[~batch["is_answer"]], 0)
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        np.testing.assert_allclose(metrics[name], case["metrics"][name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_kl_estimate_is_never_negative():
    kto, batch = KTO(**SETTINGS), unpaired_batch(3, 8)
    lower = {"model": {**REFERENCE["model"], "logprobs": REFERENCE["model"]["logprobs"] - 1.0}}
    prepared = kto.prepare(runtime(REFERENCE), lower, batch, jax.random.key(0))
    np.testing.assert_array_equal(prepared["kl"], np.zeros(8))
    assert not any(name.startswith("kl_") for name in prepared)


def test_labels_of_one_kind_only():
    kto, batch = KTO(**SETTINGS), unpaired_batch(3, 8)
    batch["is_desirable"] = np.ones(8, bool)
    prepared = kto.prepare(runtime(REFERENCE), POLICY, batch, jax.random.key(0))
    loss, metrics = kto.loss(MODEL, POLICY, prepared)
    assert np.isfinite(loss)
    assert metrics["rewards/rejected"] == 0
    np.testing.assert_allclose(metrics["rewards/margins"], metrics["rewards/chosen"])


def test_the_batch_can_be_larger_than_what_is_scored_at_once():
    kto, batch = KTO(**SETTINGS), unpaired_batch(3, 8)
    whole, sliced = (kto.prepare(runtime(REFERENCE, rows), POLICY, batch, jax.random.key(0)) for rows in (8, 3))
    np.testing.assert_allclose(whole["kl"], sliced["kl"], rtol=1e-6)
    np.testing.assert_array_equal(whole["reference_logprobs"], sliced["reference_logprobs"])


def test_a_moving_reference_moves_once_a_batch():
    kto, run = KTO(**SETTINGS, reference=Synced(every=1, mixup=1.0)), runtime(REFERENCE)
    for _ in range(3):
        kto.prepare(run, POLICY, unpaired_batch(3, 8), jax.random.key(0))
    assert run.memory["reference_batches"] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": NoReference()}, "algorithm.reference=NoReference: an unpaired loss measures an answer"),
        ({"desirable_weight": -1.0}, "desirable_weight=-1.0 of KTO must be at least 0"),
        ({"beta": 0}, "beta=0 of KTO must be above 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        KTO(**SETTINGS, **settings)


def test_no_closed_form_of_the_first_loss_with_unequal_weights():
    assert KTO(**SETTINGS, desirable_weight=1.33).expected_first_loss() is None
    assert KTO(**SETTINGS, desirable_weight=2.0, undesirable_weight=2.0).expected_first_loss() == 1.0


def test_precomputed_reference_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="which no file can hold beforehand"):
        KTO(**SETTINGS, reference=Precomputed(cache_dir=str(tmp_path)))
