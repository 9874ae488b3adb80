"""Every conf/algorithm/*.yaml: complete, commented, builds, and keeps the rules that all algorithms keep."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from table_model import MODEL, random_batch, random_params, rows_of, runtime, unpaired_batch

from rlhf.algorithms.base import Algorithm

FOLDER = Path(__file__).resolve().parents[2] / "conf/algorithm"
OFFLINE = ("conversation", "preference", "unpaired")


def build(path: Path, **changes) -> Algorithm:
    return instantiate(OmegaConf.merge(OmegaConf.load(path), changes), _convert_="all")


YAMLS = [path for path in sorted(FOLDER.glob("*.yaml")) if build(path).form in OFFLINE]
every_yaml = pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
any_yaml = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)


def nodes(value) -> list[dict]:
    """The mapping and all mappings inside it that build an object."""
    if isinstance(value, list):
        return [node for item in value for node in nodes(item)]
    if not isinstance(value, dict):
        return []
    return [value] * ("_target_" in value) + [node for item in value.values() for node in nodes(item)]


@any_yaml
def test_every_argument_has_a_key(path):
    for node in nodes(OmegaConf.to_container(OmegaConf.load(path))):
        wanted = {field.name for field in dataclasses.fields(get_class(node["_target_"]))}
        assert set(node) - {"_target_"} == wanted, node["_target_"]


@any_yaml
def test_every_key_has_a_comment(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    keys = [line for line in lines if re.match(r"\s*(- )?\w+:", line) and "_target_:" not in line]
    assert [line for line in keys if not re.search(r"  # [A-Z].*\.$", line)] == []
    assert not any("defaults:" in line for line in lines)


def batch_for(algorithm: Algorithm, n_rows: int) -> dict:
    if algorithm.form == "preference":
        return random_batch(3, (n_rows, 2, 12))
    return unpaired_batch(3, n_rows) if algorithm.form == "unpaired" else random_batch(3, (n_rows, 12))


POLICY, REFERENCE = random_params(1), random_params(2)


@jax.jit
def loss_and_gradient(algorithm, params, prepared):
    (loss, metrics), gradient = jax.value_and_grad(lambda p: algorithm.loss(MODEL, p, prepared), has_aux=True)(params)
    return loss, metrics, gradient["model"]["logprobs"]


def prepared_by(algorithm, params, reference=REFERENCE):
    return algorithm.prepare(runtime(reference), params, batch_for(algorithm, 8), jax.random.key(0))


CUTTABLE = [path for path in YAMLS if not build(path).needs_whole_batch]  # the others refuse it: test_dpo.py


@pytest.mark.parametrize("path", CUTTABLE, ids=lambda path: path.stem)
def test_microbatches_give_the_gradient_of_the_whole_batch(path):
    algorithm = build(path, batch_size=8, microbatch_size=8)
    prepared = prepared_by(algorithm, POLICY)
    loss, metrics, gradient = loss_and_gradient(algorithm, POLICY, prepared)
    parts = [loss_and_gradient(algorithm, POLICY, rows_of(prepared, slice(i, None, 4))) for i in range(4)]
    np.testing.assert_allclose(np.mean([part[0] for part in parts]), loss, rtol=2e-6)
    np.testing.assert_allclose(np.mean([part[2] for part in parts], axis=0), gradient, rtol=1e-5, atol=1e-6)
    for name, value in metrics.items():
        mean = np.mean([part[1][name] for part in parts])
        np.testing.assert_allclose(mean, value, rtol=1e-5, atol=1e-6, err_msg=name)


# DiscoPOP's loss rises with the margin just around 0; WPO's weights move with the policy, without a gradient
DESCENDING = [path for path in YAMLS if path.stem not in ("discopop", "wpo")]


@pytest.mark.parametrize("path", DESCENDING, ids=lambda path: path.stem)
def test_a_small_step_lowers_the_loss_and_widens_the_margin(path):
    algorithm = build(path, batch_size=8, microbatch_size=8)
    prepared = prepared_by(algorithm, REFERENCE)  # the start of training
    before, metrics_before, gradient = loss_and_gradient(algorithm, REFERENCE, prepared)
    step = 1e-3 / jnp.max(jnp.abs(gradient))
    moved = {"model": {**REFERENCE["model"], "logprobs": REFERENCE["model"]["logprobs"] - step * gradient}}
    after, metrics, _ = loss_and_gradient(algorithm, moved, prepared)
    assert after < before
    if algorithm.form == "preference":
        assert metrics["rewards/margins"] > metrics_before["rewards/margins"]


LN2 = np.log(2)
FIRST_LOSS = {
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_down": 1.0,
    "apo_zero": 1.0,
    "apo_zero_unpaired": 0.5,
    "bco": 2 * LN2,
    "cdpo": LN2,
    "discopop": 0.5 * LN2 + 0.5,
    "dpo": LN2,
    "dpo_cached": LN2,
    "dpo_norm": LN2,
    "exo": -LN2 - 0.5 * np.log(0.999 * 0.001),
    "fdpo_alpha": LN2,
    "fdpo_forward_kl": LN2,
    "fdpo_js": LN2,
    "hinge": 1.0,
    "ipo": (1 / (2 * 0.1)) ** 2,
    "kto": 0.5,
    "ld_dpo": LN2,
    "nca": 2 * LN2,
    "robust_dpo": LN2,
    "sppo": 2 * (1 / (2 * 1e-3)) ** 2,
    "tr_dpo": LN2,
}


@every_yaml
def test_the_first_loss_is_the_closed_form(path):
    algorithm = build(path, batch_size=8, microbatch_size=8)
    expected = algorithm.expected_first_loss()
    if expected is None:
        assert path.stem not in FIRST_LOSS
        return
    np.testing.assert_allclose(expected, FIRST_LOSS[path.stem], rtol=1e-6)
    loss, _, _ = loss_and_gradient(algorithm, REFERENCE, prepared_by(algorithm, REFERENCE))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@every_yaml
def test_another_beta_compiles_nothing_new(path):
    """Numbers are leaves of the algorithm's tree, structure is its definition: two settings differ in leaves only."""
    changes = {"batch_size": 8, "microbatch_size": 8}
    one = build(path, **changes)
    other = build(path, **changes, learning_rate=0.5, **({"beta": 0.77} if hasattr(one, "beta") else {}))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    prepared = prepared_by(one, POLICY)
    loss_and_gradient(one, POLICY, prepared)
    n_compiled = loss_and_gradient._cache_size()
    loss_and_gradient(other, POLICY, prepared)
    assert loss_and_gradient._cache_size() == n_compiled
