"""The released sizes: every shape and number as in the reference implementation."""

import json
import math

import jax
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from rlhf.model.checkpoints.names import sizes, slots
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.run import CONF

SIZES = ("270m", "1b", "4b", "12b", "27b")
MILLIONS = {"270m": (268.1, 268.1), "1b": (999.9, 999.9), "4b": (4299.9, 3880.1)}
MILLIONS |= {"12b": (12187.1, 11765.8), "27b": (27432.1, 27009.0)}


def settings(name: str):
    with initialize_config_dir(CONF, version_base="1.3"):
        return instantiate(compose("config", overrides=[f"model=gemma3_{name}"]).model, _convert_="all")


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_every_size(shared, size):
    """Names, shapes and counts: those that a checkpoint must have are those of the reference's parameter tree."""
    tree = json.loads((shared / "fixtures" / "gemma3_param_trees.json").read_text())[size]
    a = settings(size).architecture()
    needed = {slot.name: list(slot.entry.rule.file_shape(sizes(a))) for slot in slots("orbax", a)}
    nested = {
        name + "/w" if name.endswith(("gating_einsum", "linear")) else name: x for name, x in tree["nested"].items()
    }
    assert needed == nested
    n_all = Gemma3(a).n_parameters()
    n_text = sum(math.prod(x.shape) for x in jax.tree.leaves(Gemma3(a).abstract()))
    assert (n_all, n_text) == (tree["params_total"], tree["params_text"])
    assert (round(n_all / 1e6, 1), round(n_text / 1e6, 1)) == MILLIONS[size]
    for world in ("orbax", "hf"):
        assert sum(math.prod(slot.entry.rule.file_shape(sizes(a))) for slot in slots(world, a)) == n_all


@pytest.mark.parametrize("size", SIZES)
def test_numbers_of_every_size(shared, size):
    config = json.loads((shared / "fixtures" / "gemma3_param_trees.json").read_text())[size]["config"]
    a = settings(size).architecture()
    assert a.query_scale == pytest.approx(config["query_pre_attn_scalar"], rel=1e-6)
    assert [i for i, one in enumerate(a.is_global()) if one] == config["global_layers"]
    assert (a.window, a.rope_scale) == (config["sliding_window_size"], config["global_scale_factor"])
    assert (a.rope_base_local, a.rope_base_global) == (config["local_base_frequency"], config["global_base_frequency"])
    assert (a.vision is not None) == config["vision"]


@pytest.mark.parametrize("size", SIZES)
def test_the_tuned_form_is_the_same_model(size):
    base, tuned = settings(size), settings(f"{size}_it")
    assert base.architecture() == tuned.architecture()
    assert tuned.checkpoint == f"{base.checkpoint}-it"
    assert base.checkpoint.startswith("google/gemma-3/flax/gemma")


def test_a_large_size_can_be_without_its_tower():
    with initialize_config_dir(CONF, version_base="1.3"):
        model = compose("config", overrides=["model=gemma3_4b", "model.vision=null"]).model
    a = instantiate(model, _convert_="all").architecture()
    assert isinstance(a, Architecture)
    assert Gemma3(a).n_parameters() == 3_880_099_328
