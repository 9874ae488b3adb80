"""Images through the data pipeline and the model: packed, joint, mixed, on a mesh; and how often the tower runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.algorithms.dpo import DPO
from rlhf.algorithms.reference import LiveReference
from rlhf.algorithms.sft import SFT
from rlhf.data.batches import collate
from rlhf.data.colours import Colours
from rlhf.errors import ConfigError
from rlhf.model import gemma3, vision
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.settings import ModelSettings, VisionSettings
from rlhf.model.sharding import make_mesh, place, place_rows
from rlhf.model.tokenizer import Tokenizer
from rlhf.model.vision import Vision
from rlhf.train.drawn import Drawn
from rlhf.train.update import loss_and_gradient

TOKENIZER = Tokenizer()
NUMBERS = {"image_size": 16, "patch": 4, "width": 16, "ff_width": 24, "layers": 1, "heads": 2, "tokens_per_image": 4}
VISION = Vision(**NUMBERS)
MODEL = Gemma3(Architecture(TOKENIZER.n_vocab, 32, 48, 2, 2, 1, 16, 0.25, 24, pattern=2, vision=VISION))
TOKEN_LOGPROBS = jax.jit(Gemma3.token_logprobs, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return Drawn(0).load(MODEL.architecture, "float32", None)


def load(form, n=12, **settings):
    return Colours(max_length=64, n_train=n, **settings).load("train", form, TOKENIZER, VISION)


def scores(params, batch):
    return np.asarray(TOKEN_LOGPROBS(MODEL, params, batch))


def test_what_a_picture_shows_changes_its_own_row_only(params):
    batch = collate(load("conversation"), range(4))
    before = scores(params, batch)
    images = batch["images"].copy()
    images[1] = 255 - images[1]
    moved = np.abs(scores(params, {**batch, "images": images}) - before).max(axis=1)
    assert moved[1] > 0.01
    assert moved[[0, 2, 3]].max() == 0


def test_rows_without_images_are_what_they_are_without_a_tower(params):
    batch = collate(load("conversation"), range(4))
    text = {name: x for name, x in batch.items() if name not in ("images", "soft_tokens")}
    plain = scores({"model": params["model"]}, text)  # there is no tower to run
    soft_tokens = batch["soft_tokens"].copy()
    soft_tokens[2:] = 0
    mixed = scores(params, {**batch, "soft_tokens": soft_tokens})
    np.testing.assert_allclose(mixed[2:], plain[2:], atol=1e-5)
    assert np.abs(mixed[:2] - plain[:2]).max() > 0.01


def test_packed_rows_equal_separate_ones(params):
    examples = Colours(max_length=128, n_train=6, packing=True).load("train", "conversation", TOKENIZER, VISION)
    assert examples.n_slots == 3
    packed = collate(examples, range(len(examples.packs)))
    together = scores(params, packed)
    alone = Colours(max_length=128, n_train=6).load("train", "conversation", TOKENIZER, VISION)
    separate = scores(params, collate(alone, range(6)))
    for row, pack in enumerate(examples.packs):
        expected = [separate[index, : len(alone.sequences[index][0].tokens)] for index in pack]
        n = sum(map(len, expected))
        np.testing.assert_allclose(together[row, :n], np.concatenate(expected), atol=1e-5)


@pytest.fixture(scope="module")
def pairs():
    examples = load("preference")
    assert examples.n_joint == 64
    return {name: x for name, x in collate(examples, range(4)).items() if name != "row"}


@pytest.fixture(scope="module")
def on_one_device(params, pairs):
    return differentiated(params, pairs)


def differentiated(params, batch):
    weight = jnp.asarray(np.random.default_rng(0).normal(size=batch["tokens"].shape) * batch["is_answer"], jnp.float32)

    def total(p, rows):
        logprobs = MODEL.token_logprobs(p, rows)
        return jnp.sum(weight * logprobs), logprobs

    (_, logprobs), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params, batch)
    return logprobs, gradient


def require_same(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), found[1], wanted[1])


def test_joint_rows_equal_separate_ones_in_value_and_gradient(params, pairs, on_one_device):
    apart = {name: x for name, x in pairs.items() if not name.startswith("joint_")}
    require_same(on_one_device, differentiated(params, apart))
    gradient = on_one_device[1]
    assert float(jnp.abs(gradient["vision"]["patch_kernel"]).max()) > 0


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_tower_runs_once_for_a_pair(params, share_prompt, monkeypatch):
    seen = []

    def counted(tree, images, *rest):
        seen.append(images.shape[:2])
        return vision.soft_features(tree, images, *rest)

    monkeypatch.setattr(gemma3, "soft_features", counted)
    batch = collate(load("preference", share_prompt=share_prompt), range(4))
    jax.eval_shape(lambda p: MODEL.token_logprobs(p, batch), params)
    assert seen == [(4, 1)]  # 4 pairs of one image: not 8


def test_policy_and_reference_see_the_same_images(params, pairs):
    algorithm = DPO(learning_rate=1e-3, batch_size=4, microbatch_size=4)
    reference = LiveReference(MODEL, params, 4).token_logprobs(pairs)
    batch = {**pairs, "reference_logprobs": reference, "sft_token_weight": pairs["is_answer"][:, 0] * 0.0}
    loss = jax.jit(lambda p, rows: algorithm.loss(MODEL, p, rows)[0])
    assert float(loss(params, batch)) == pytest.approx(np.log(2), abs=1e-5)
    assert abs(float(loss(params, {**batch, "images": batch["images"] * 0})) - np.log(2)) > 1e-5


def test_a_frozen_tower_gets_no_gradient(params):
    """The rest gets the same as if it were trained."""
    batch = collate(load("conversation"), range(4))
    batch["weight"] = batch["is_answer"] * 1.0
    algorithm = SFT(learning_rate=1e-3, batch_size=4, microbatch_size=4)
    run = jax.jit(loss_and_gradient, static_argnums=4)
    _, whole = run(params, {}, batch, algorithm, MODEL)
    _, part = run({"model": params["model"]}, {"vision": params["vision"]}, batch, algorithm, MODEL)
    assert set(part) == {"model"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), part["model"], whole["model"])


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 2)])
def test_a_mesh_gives_the_numbers_of_one_device(params, pairs, on_one_device, shape):
    mesh = make_mesh(*shape)
    spread = place(params, mesh)
    project = spread["vision"]["project"]
    assert project.addressable_shards[0].data.shape[0] == project.shape[0] // shape[1]
    inputs = {**place_rows(pairs, mesh), "is_answer": pairs["is_answer"]}
    require_same(differentiated(spread, inputs), on_one_device)


@pytest.mark.parametrize("limit", ["PATCHES", "QUERIES"])
def test_working_in_parts_changes_nothing(params, limit, monkeypatch):
    """Pictures some at a time, and queries some at a time: values and gradients are those of all at once."""
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16, 3), dtype=np.uint8))

    def total(tree):
        features = vision.soft_features(tree, images, VISION)
        return jnp.sum(jnp.sin(features)), features

    def run():
        (_, features), gradient = jax.jit(jax.value_and_grad(lambda t: total(t), has_aux=True))(params["vision"])
        return features, gradient

    whole, expected = run()
    monkeypatch.setattr(vision, limit, {"PATCHES": 2 * 16, "QUERIES": 8}[limit])
    parts, gradient = run()
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, expected)


def test_bfloat16_stays_near_float32(params):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 1, 16, 16, 3), dtype=np.uint8))
    exact = vision.soft_features(params["vision"], images, VISION)
    rough = vision.soft_features(params["vision"], images, VISION, "bfloat16")
    assert rough.dtype == jnp.bfloat16
    assert 1e-6 < float(jnp.abs(rough - exact).max()) < 0.15


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"patch": 5}, "image_size=16 must be a multiple of patch=5"),
        ({"heads": 3}, "width=16 must be a multiple of heads=3"),
        ({"tokens_per_image": 9}, "tokens_per_image=9 must divide the 4 × 4 patches .*: one of 1, 4, 16"),
        ({"layers": 0}, "layers=0 of VisionSettings must be above 0"),
    ],
)
def test_numbers_that_do_not_fit(change, reason):
    with pytest.raises(ConfigError, match=reason):
        VisionSettings(**{**NUMBERS, **change})


def test_training_a_tower_that_is_not_there():
    a = Architecture(8, 8, 8, 1, 1, 1, 8, 1.0, 4)
    with pytest.raises(ConfigError, match=r"train_vision=true needs model.vision"):
        ModelSettings(**a.__dict__, train_vision=True)


def test_parameter_counts_of_the_published_towers(shared):
    trees = json.loads((shared / "fixtures" / "gemma3_param_trees.json").read_text())
    tower = Vision(896, 14, 1152, 4304, 27, 16, 256)
    sizes = {
        "4b": (2560, 10240, 34, 8, 4, 256),
        "12b": (3840, 15360, 48, 16, 8, 256),
        "27b": (5376, 21504, 62, 32, 16, 128),
    }
    for name, (width, ff, layers, heads, kv, head) in sizes.items():
        a = Architecture(262144, width, ff, layers, heads, kv, head, head**-0.5, 1024, vision=tower)
        assert Gemma3(a).n_parameters() == trees[name]["params_total"]
