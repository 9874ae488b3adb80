"""The DPO family against a reference implementation's numbers: loss, metrics, gradient of each token's log-probability.

Where that implementation leaves the paper, tests/ops/test_preference.py has the paper's formula by hand: it ignores
label smoothing in the sigmoid loss.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table_model import MODEL, SHARED_LOSSES, runtime

from rlhf.algorithms.dpo import DPO
from rlhf.algorithms.reference import NoReference
from rlhf.ops.divergence import AlphaDivergence, ForwardKL, JensenShannon, ReverseKL
from rlhf.ops.pair_weights import WPO, Unweighted
from rlhf.ops.pooling import Alpha, LengthDesensitized, Mean, Sum
from rlhf.ops.preference import EXO, IPO, DiscoPOP, Hinge, Mixture, Robust, Sigmoid
from rlhf.ops.preference_absolute import BCO, NCA, SPPO, APODown, APOZero
from rlhf.ops.preference_free import OddsRatio, SimPO
from rlhf.ops.preference_sorted import AOT, AOTUnpaired

EXPECTED = json.loads((SHARED_LOSSES / "expected.json").read_text()) if SHARED_LOSSES.exists() else {}
SETTINGS = {"learning_rate": 1e-6, "batch_size": 4, "microbatch_size": 4}

LOSSES = {
    "sigmoid": lambda smoothing: Sigmoid(),
    "sigmoid_norm": lambda smoothing: Sigmoid(per_token=True),
    "hinge": lambda smoothing: Hinge(),
    "ipo": lambda smoothing: IPO(),
    "exo_pair": lambda smoothing: EXO(label_smoothing=smoothing),
    "nca_pair": lambda smoothing: NCA(),
    "robust": lambda smoothing: Robust(label_smoothing=smoothing),
    "bco_pair": lambda smoothing: BCO(),
    "sppo_hard": lambda smoothing: SPPO(),
    "aot": lambda smoothing: AOT(label_smoothing=smoothing),
    "aot_unpaired": lambda smoothing: AOTUnpaired(label_smoothing=smoothing),
    "apo_zero": lambda smoothing: APOZero(),
    "apo_down": lambda smoothing: APODown(),
    "discopop": lambda smoothing: DiscoPOP(),
}
DIVERGENCES = {
    None: ReverseKL(),
    "forward_kl": ForwardKL(),
    "js_divergence": JensenShannon(),
    "alpha_divergence": AlphaDivergence(alpha=0.5),
}


def cases(group: str) -> list:
    found = [pytest.param(case, id=case["id"]) for case in EXPECTED.get(group, {"cases": []})["cases"]]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason="needs the folder `shared` beside the checkout"))]


def algorithm(case: dict) -> DPO:
    names = case["loss_type"] if isinstance(case["loss_type"], list) else [case["loss_type"]]
    weights = case.get("loss_weights", [1.0])
    smoothing = case.get("label_smoothing", 0.0)
    sft_weight = sum(w for name, w in zip(names, weights, strict=True) if name == "sft")
    losses = [(LOSSES[name](smoothing), w) for name, w in zip(names, weights, strict=True) if name != "sft"]
    mixture = Mixture(losses=[loss for loss, _ in losses] or [Sigmoid()], weights=[w for _, w in losses] or [0.0])
    return DPO(
        **SETTINGS,
        beta=case.get("beta", 0.1),
        preference=losses[0][0] if len(names) == 1 and losses else mixture,
        divergence=DIVERGENCES[case.get("f_div")],
        pooling=LengthDesensitized(alpha=case["ld_alpha"]) if "ld_alpha" in case else Sum(),
        weighting=WPO() if case.get("wpo") else Unweighted(),
        sft_weight=sft_weight,
    )


@pytest.fixture(scope="module")
def inputs(shared):
    return dict(np.load(shared / "fixtures/losses/inputs.npz"))


def paired(inputs, name: str) -> np.ndarray:
    """[8, 13] of predictions, chosen rows first -> [4, 2, 14] of tokens: the first token is predicted by nothing."""
    values = inputs[name].astype(np.float32)
    if values.shape[1] == 13:
        values = np.pad(values, ((0, 0), (1, 0)))
    return np.stack([values[:4], values[4:]], axis=1)


@pytest.fixture(scope="module")
def batch(inputs):
    """Every token is a word of its own, so that the model's table holds the log-probability of each."""
    is_answer = paired(inputs, "dpo_completion_mask") > 0
    segments = paired(inputs, "dpo_attention_mask").astype(np.int32)
    tokens = np.arange(is_answer.size, dtype=np.int32).reshape(is_answer.shape)
    positions = np.broadcast_to(np.arange(14, dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "is_answer": is_answer, "segments": segments, "positions": positions}


def table(inputs, logprobs: str) -> dict:
    collision = paired(inputs, "dpo_log_sum_sq_probs")
    return {
        "model": {
            "logprobs": jnp.asarray(paired(inputs, logprobs).ravel()),
            "collision": jnp.asarray(collision.ravel()),
        }
    }


def first_step(dpo: DPO, inputs, batch):
    """(loss, metrics, gradient of each token's log-probability) of the first step, through prepare and loss."""
    params = table(inputs, "dpo_policy_logps")
    prepared = dpo.prepare(runtime(table(inputs, "dpo_ref_logps")), params, batch, jax.random.key(0))
    (loss, metrics), gradient = jax.value_and_grad(lambda p: dpo.loss(MODEL, p, prepared), has_aux=True)(params)
    return loss, metrics, gradient["model"]["logprobs"].reshape(4, 2, 14)


def unmasked_sum(gradient, case: dict) -> float:
    """Sum of |gradient| as recorded: before the mask was applied, so that all 13 places of a row have the same one."""
    if case["loss_type"] == "sft":
        return float(jnp.sum(jnp.abs(gradient)))
    return float(13 * jnp.sum(jnp.max(jnp.abs(gradient), axis=-1)))


@pytest.mark.parametrize("case", cases("dpo"))
def test_dpo(case, inputs, batch, shared):
    loss, metrics, gradient = first_step(algorithm(case), inputs, batch)
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-5)
    is_answer = batch["is_answer"]
    np.testing.assert_array_equal(gradient[~is_answer], 0)
    grads = np.load(shared / "fixtures/losses/grads.npz")
    if (name := case["id"].replace("/", "|")) in grads:
        expected = np.stack([grads[name][:4], grads[name][4:]], axis=1)  # not masked there: compare answer tokens
        np.testing.assert_allclose(
            gradient[..., 1:][is_answer[..., 1:]], expected[is_answer[..., 1:]], rtol=1e-5, atol=1e-6
        )
    else:
        np.testing.assert_allclose(unmasked_sum(gradient, case), case["grad_abs_sum"], rtol=1e-5)
    for name in ("chosen", "rejected", "accuracies", "margins"):
        np.testing.assert_allclose(metrics[f"rewards/{name}"], case["metrics"][f"rewards/{name}"], rtol=1e-5, atol=1e-6)
    for name in ("chosen", "rejected"):
        np.testing.assert_allclose(metrics[f"logps/{name}"], case["metrics"][f"logps/{name}"], rtol=1e-5)


def test_all_cases_are_there():
    assert not EXPECTED or (len(EXPECTED["dpo"]["cases"]), len(EXPECTED["cpo_orpo"]["cases"])) == (67, 9)


REFERENCE_FREE = {"sigmoid": Sigmoid, "hinge": Hinge, "ipo": IPO, "simpo": SimPO}


@pytest.mark.parametrize("case", cases("cpo_orpo"))
def test_reference_free(case, inputs, batch):
    if case["id"] == "orpo":
        preference, pooling = OddsRatio(), Mean()
    else:
        known = {"label_smoothing": case["label_smoothing"], "gamma": case["simpo_gamma"], "per_token": False}
        kind = REFERENCE_FREE[case["loss_type"]]
        preference = kind(**{name: value for name, value in known.items() if name in kind.__dataclass_fields__})
        pooling = Sum() if case["logps"] == "sum" else Alpha(alpha=case["alpha"]) if case["alpha"] else Mean()
    dpo = DPO(**SETTINGS, beta=case["beta"], preference=preference, pooling=pooling, reference=NoReference())
    pairs = dpo.pairs(jnp.asarray(paired(inputs, "dpo_policy_logps")), batch)
    sign = -1 if case["id"] == "orpo" else 1  # there they are what is subtracted from the likelihood term
    np.testing.assert_allclose(sign * dpo.preference(pairs, dpo.beta), case["losses"], rtol=1e-5, atol=1e-7)
    if "chosen_rewards" in case:
        rewards = np.stack([case["chosen_rewards"], case["rejected_rewards"]], axis=1)
        np.testing.assert_allclose(dpo.beta * pairs.log_ratios, rewards, rtol=1e-5)
    loss, metrics, _ = first_step(dpo, inputs, batch)
    np.testing.assert_allclose(loss, sign * np.mean(case["losses"]), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/chosen"], np.mean(dpo.beta * pairs.policy[:, 0]), rtol=1e-6)


def test_orpo_adds_the_likelihood_of_the_chosen_answer(inputs, batch):
    settings = {**SETTINGS, "beta": 0.1, "preference": OddsRatio(), "pooling": Mean(), "reference": NoReference()}
    alone, _, _ = first_step(DPO(**settings), inputs, batch)
    both, metrics, _ = first_step(DPO(**settings, sft_weight=1.0), inputs, batch)
    chosen, is_answer = paired(inputs, "dpo_policy_logps")[:, 0], batch["is_answer"][:, 0]
    np.testing.assert_allclose(metrics["nll"], -chosen[is_answer].mean(), rtol=1e-6)
    np.testing.assert_allclose(both, alone + metrics["nll"], rtol=1e-6)


def test_mixtures_log_each_part(inputs, batch):
    case = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    loss, metrics, _ = first_step(algorithm(case), inputs, batch)
    np.testing.assert_allclose(metrics["loss/sigmoid"], 0.7282942, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/bco"], 1.4220464, rtol=1e-6)
    np.testing.assert_allclose(metrics["nll"], 1.0880998, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.8 * 0.7282942 + 0.2 * 1.4220464 + 1.0880998, rtol=1e-6)
