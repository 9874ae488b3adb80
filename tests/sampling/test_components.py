"""Prompts with images, and adapters on and off, through the same cache."""

import dataclasses

import jax
import numpy as np
import pytest
from reference_vision import load_torch_form
from test_generate import KEY, prompts_of, recompute, small  # noqa: F401

from rlhf.errors import DataError
from rlhf.model.gemma3 import Gemma3
from rlhf.model.lora import LoRA, draw_adapter, merged
from rlhf.sampling.generate import generate
from rlhf.sampling.methods import Greedy, Sample
from rlhf.sampling.sampler import images_of
from rlhf.sampling.schedule import PromptImages
from rlhf.sampling.shapes import Shape
from rlhf.sampling.weights import DecodingWeights

IMAGE, NEVER = 282, (0, 280, 281, 282)


def image_prompts(expected):
    """Token ids and images of the fixture's rows: one image, two, none."""
    prompts, pictures, used = [], [], 0
    for row, n, n_images in zip(expected["input_ids"], expected["lengths"], expected["images_per_row"], strict=True):
        is_soft = row[:n] == IMAGE
        prompts.append(np.where(is_soft, 0, row[:n]).tolist())
        images = expected["pixel_values"][used : used + n_images].transpose(0, 2, 3, 1)
        used += n_images
        soft = np.where(is_soft, np.cumsum(is_soft), 0)
        pictures.append(PromptImages(soft, images) if n_images else None)
    return prompts, pictures


def test_greedy_with_images_equals_the_reference(shared):
    """In two entries for seven prompts of one image, two and none, after 200 calls of other sizes and settings."""
    a, params, expected = load_torch_form(shared / "fixtures" / "gemma3_tiny_mm")
    prompts, pictures = image_prompts(expected)
    weights, rng = DecodingWeights(Gemma3(a)), np.random.default_rng(0)
    shape = Shape(entries=2, lanes=1, prompt_tokens=32, new_tokens=16)
    settings = {"stop_ids": (), "forbidden_ids": NEVER, "shape": shape, "weights": weights}

    def answers(order, method, n_tokens, key=KEY):
        some = {"pictures": [pictures[i] for i in order], "max_new_tokens": n_tokens, "key": key}
        return generate(Gemma3(a), params, [prompts[i] for i in order], method=method, **some, **settings)

    for step in range(200):
        order = rng.integers(0, 3, step % 3 + 1)
        answers(order, Sample(temperature=0.7, top_k=step % 5), int(rng.integers(1, 4)), jax.random.key(step))
    order = [2, 0, 1, 2, 0, 1, 1]
    np.testing.assert_array_equal(answers(order, Greedy(), 12).tokens, expected["greedy"][order])


@dataclasses.dataclass(frozen=True)
class Seeing:
    token_ids: tuple = (2,)
    answer: None = None
    fields: dict = dataclasses.field(default_factory=dict)
    row: int = 0
    soft_tokens: tuple = (1,)
    pictures: tuple = ("a picture",)


def test_an_image_for_a_text_model_is_refused(small):  # noqa: F811
    with pytest.raises(DataError, match="a prompt has an image, and the model reads text only"):
        images_of([Seeing()], small[0])


@pytest.fixture(scope="module")
def adapted(small):  # noqa: F811
    """An adapter that changes the answers."""
    model, params = small
    lora = LoRA(rank=2, alpha=4.0, targets="all")
    adapter = draw_adapter(jax.random.key(1), model.architecture, lora)
    layers = {
        name: {"a": x["a"], "b": 0.3 * jax.random.normal(jax.random.key(len(name)), x["b"].shape)}
        for name, x in adapter["layers"].items()
    }
    return {**params, "adapter": {"layers": layers}, "adapter_scale": jax.numpy.float32(lora.scale)}


def test_an_adapter_is_on_or_off_over_one_base(small, adapted):  # noqa: F811
    model, params = small
    weights = DecodingWeights(model)
    shape = Shape(entries=6, lanes=1, prompt_tokens=32, new_tokens=16)
    settings = {"max_new_tokens": 12, "key": KEY, "stop_ids": (), "shape": shape, "method": Sample()}
    prompts = prompts_of((7, 30, 3))
    on = generate(model, adapted, prompts, weights=weights, **settings)
    base = weights.of(adapted)["model"]["layers"][0]["query"]
    off = generate(model, params, prompts, weights=weights, **settings)
    assert weights.of(params)["model"]["layers"][0]["query"] is base
    assert (on.tokens != off.tokens).any()
    np.testing.assert_array_equal(off.tokens, generate(model, params, prompts, **settings).tokens)
    for i, logprobs in enumerate(recompute(model, adapted, prompts, on, 1.0)):
        np.testing.assert_allclose(on.logprobs[i], logprobs, atol=1e-4)
    whole = merged(params["model"], adapted["adapter"], adapted["adapter_scale"])
    np.testing.assert_array_equal(generate(model, {"model": whole}, prompts, **settings).tokens, on.tokens)


def test_new_parameters_make_new_weights(small):  # noqa: F811
    model, params = small
    weights = DecodingWeights(model)
    first = weights.of(params)["model"]["layers"][0]["query"]
    assert weights.of(dict(params))["model"]["layers"][0]["query"] is first
    changed = {"model": jax.tree.map(lambda x: x + 1, params["model"])}
    second = weights.of(changed)["model"]["layers"][0]["query"]
    np.testing.assert_allclose(second, first + 1, rtol=1e-6)
    weights.release()
    assert weights.of(changed)["model"]["layers"][0]["query"] is not second


def test_the_embedding_is_not_copied(small):  # noqa: F811
    model, params = small
    assert DecodingWeights(model).of(params)["model"]["embedding"] is params["model"]["embedding"]
