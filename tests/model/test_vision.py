"""The vision tower and soft tokens against the numbers of the reference implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_vision import load_jax_form, load_torch_form, soft_places, tower_norms
from test_gemma3 import grad_norms

from rlhf.model.gemma3 import Gemma3
from rlhf.model.vision import encode_patches, pool, soft_features


@pytest.fixture(scope="module")
def reference(shared):
    a, params, expected = load_torch_form(shared / "fixtures" / "gemma3_tiny_mm")
    is_real = expected["attention_mask"].astype(bool)
    pixels = expected["pixel_values"].transpose(0, 2, 3, 1)
    images = np.zeros((3, 2, *pixels.shape[1:]), np.float32)
    images[0, 0], images[1] = pixels[0], pixels[1:]  # one in the first row, two in the second, none in the third
    batch = {
        "tokens": expected["input_ids"],
        "segments": is_real.astype(np.int32),
        "positions": np.maximum(np.cumsum(is_real, axis=1) - 1, 0).astype(np.int32),
        "soft_tokens": soft_places(expected["token_type_ids"] == 1, a.vision.tokens_per_image),
        "images": images,
    }
    return a, params, jax.tree.map(jnp.asarray, batch), expected


def test_tower_and_projection_equal_the_reference(reference):
    a, params, _, expected = reference
    pixels = jnp.asarray(expected["pixel_values"].transpose(0, 2, 3, 1))
    patches = jax.jit(encode_patches, static_argnums=2)(params["vision"], pixels, a.vision)
    np.testing.assert_allclose(patches, expected["vision_last_hidden_state"], atol=1e-4)
    soft = jax.jit(soft_features, static_argnums=2)(params["vision"], pixels[:, None], a.vision)
    np.testing.assert_allclose(soft, expected["image_tokens"], atol=1e-4)


@pytest.mark.parametrize("form", [{}, {"scan_layers": False}], ids=["scan", "layers"])
def test_logits_equal_the_reference(reference, form):
    a, params, batch, expected = reference
    logits = jax.jit(Gemma3(a, **form).logits)(params, **batch)
    logits = np.where(batch["segments"][..., None] > 0, logits, 0)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert np.abs(logits - expected["logits_plain_causal"]).max() > 1  # without seeing each other it is another model
    logprobs = jax.jit(Gemma3(a, **form).token_logprobs)(params, batch)
    np.testing.assert_allclose(logprobs, expected["token_logprobs"], atol=1e-4)


def test_every_hidden_state_equals_the_reference(reference):
    """Of the first n layers: the others do nothing where their last norms have the weight -1."""
    a, params, batch, expected = reference
    is_real = np.asarray(batch["segments"] > 0)[..., None]
    run = jax.jit(Gemma3(a).hidden)
    for n in range(a.layers + 1):
        layers = dict(params["model"]["layers"])
        for name in ("post_attention_norm", "post_mlp_norm"):
            layers[name] = layers[name].at[n:].set(-1)
        state = run({**params, "model": {**params["model"], "layers": layers}}, **batch)
        wanted = expected["hidden_states"][n]
        if n < a.layers:  # theirs is from before the final norm
            scale = 1 + np.asarray(params["model"]["final_norm"])[None, None]
            wanted = wanted / np.sqrt(np.mean(wanted**2, axis=-1, keepdims=True) + a.eps) * scale
        np.testing.assert_allclose(np.where(is_real, state, 0), np.where(is_real, wanted, 0), atol=1e-4)


FORMS = [{}, {"scan_layers": False, "remat": "block"}]  # the text model has the two others


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_equal_the_reference_in_every_form(reference, form):
    a, params, batch, expected = reference
    is_scored = (batch["segments"] > 0) & (batch["soft_tokens"] == 0)
    is_scored = is_scored.at[:, 0].set(False)
    model = Gemma3(a, **form)

    def mean_cost(p):
        return -jnp.sum(jnp.where(is_scored, model.token_logprobs(p, batch), 0)) / jnp.sum(is_scored)

    loss, gradient = jax.jit(jax.value_and_grad(mean_cost))(params)
    assert float(loss) == pytest.approx(float(expected["loss_mean_nll"]), abs=1e-5)
    text = {name.replace("model.", "model.language_model.", 1): x for name, x in grad_norms(gradient, a).items()}
    ours = {**text, **tower_norms(gradient, a.vision)}
    theirs = dict(zip(expected["grad_names"].tolist(), expected["grad_norms"].tolist(), strict=True))
    assert set(ours) == set(theirs)
    for name, norm in theirs.items():
        assert ours[name] == pytest.approx(norm, rel=1e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def official(shared):
    return load_jax_form(shared / "fixtures" / "orbax_tiny_mm")


def test_the_official_tower(official):
    a, params, expected = official
    pixels = jnp.asarray(expected["vision_preprocessed"])[None]  # one row with two images
    patches = jax.jit(encode_patches, static_argnums=2)(params["vision"], pixels[0], a.vision)
    np.testing.assert_allclose(pool(patches, a.vision), expected["vision_soft"][0], atol=1e-4)
    soft = jax.jit(soft_features, static_argnums=2)(params["vision"], pixels, a.vision)
    np.testing.assert_allclose(soft[0], expected["vision_projected"][0].reshape(8, -1), atol=1e-4)


@pytest.mark.parametrize("case", ["A", "B", "C", "T"])
def test_the_official_model_with_images(official, case):
    """One image each, two, two slots of which one row uses one, none. The official mask is bounded on both sides in
    local layers, ours as in `gemma3_tiny_mm` on one: an image of 4 tokens reaches neither end of a window of 8."""
    a, params, expected = official
    ids = expected[f"{case}_tokens_with_mm"]
    is_real = (ids != 0).astype(np.int32)
    batch = {"tokens": np.maximum(ids, 0), "segments": is_real, "positions": np.cumsum(is_real, axis=1) - is_real}
    if case != "T":
        one, other = expected["vision_preprocessed"]
        slots = {"A": [[one], [other]], "B": [[one, other]], "C": [[one, other], [other, 0 * one]]}[case]
        batch |= {"soft_tokens": soft_places(ids == -2, a.vision.tokens_per_image), "images": np.array(slots)}
    hidden = jax.jit(Gemma3(a).hidden)(params, **jax.tree.map(jnp.asarray, batch))
    logits = np.asarray(hidden) @ np.asarray(params["model"]["embedding"])[expected["keep_columns"]].T
    for row, each in enumerate(ids):
        # what it returns for an image is of the first of its tokens
        first = np.flatnonzero(each == 255999) - 1
        inside = {place for start in first for place in range(start + 1, start + a.vision.tokens_per_image + 4)}
        places = [place for place in np.flatnonzero(each) if place not in inside]
        wanted = expected[f"{case}_logits"][row, : len(places)]
        np.testing.assert_allclose(logits[row, places], wanted, atol=1e-4)
