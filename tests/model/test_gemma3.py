"""The model against the numbers of the reference implementation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import load_reference

from rlhf.model.gemma3 import Architecture, Gemma3


@pytest.fixture(params=["gemma3_tiny_text", "gemma3_tiny_text_rope8"])
def reference(request, shared):
    return load_reference(shared / "fixtures" / request.param)


def inputs(expected):
    is_real = expected["attention_mask"].astype(bool)
    positions = np.maximum(np.cumsum(is_real, axis=1) - 1, 0).astype(np.int32)
    return tuple(jnp.asarray(x, jnp.int32) for x in (expected["input_ids"], is_real, positions))


def test_logits_equal_the_reference(reference):
    a, params, expected = reference
    tokens, segments, positions = inputs(expected)
    logits = jax.jit(Gemma3(a).logits)(params, tokens, segments, positions)
    np.testing.assert_allclose(np.where(segments[..., None] > 0, logits, 0), expected["logits"], atol=1e-4)


def test_token_logprobs_equal_the_reference(reference):
    a, params, expected = reference
    tokens, segments, positions = inputs(expected)
    batch = {"tokens": tokens, "segments": segments, "positions": positions}
    np.testing.assert_allclose(jax.jit(Gemma3(a).token_logprobs)(params, batch), expected["token_logprobs"], atol=1e-4)


def grad_norms(gradient: dict, a: Architecture) -> dict[str, float]:
    """L2 norms under the reference's parameter names."""
    g = gradient["model"]
    names = {
        "input_layernorm": g["layers"]["attention_norm"],
        "self_attn.q_proj": g["layers"]["query"],
        "self_attn.k_proj": g["layers"]["key_value"][:, :, 0],
        "self_attn.v_proj": g["layers"]["key_value"][:, :, 1],
        "self_attn.q_norm": g["layers"]["query_norm"],
        "self_attn.k_norm": g["layers"]["key_norm"],
        "self_attn.o_proj": g["layers"]["out"],
        "post_attention_layernorm": g["layers"]["post_attention_norm"],
        "pre_feedforward_layernorm": g["layers"]["mlp_norm"],
        "mlp.gate_proj": g["layers"]["gate_up"][:, :, 0],
        "mlp.up_proj": g["layers"]["gate_up"][:, :, 1],
        "mlp.down_proj": g["layers"]["down"],
        "post_feedforward_layernorm": g["layers"]["post_mlp_norm"],
    }
    norms = {
        f"model.layers.{i}.{n}.weight": float(jnp.linalg.norm(x[i])) for n, x in names.items() for i in range(a.layers)
    }
    norms["model.embed_tokens.weight"] = float(jnp.linalg.norm(g["embedding"]))
    norms["model.norm.weight"] = float(jnp.linalg.norm(g["final_norm"]))
    return norms


FORMS = [{}, {"remat": "block"}, {"scan_layers": False}, {"scan_layers": False, "remat": "block"}]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_equal_the_reference_in_every_form(reference, form):
    a, params, expected = reference
    tokens, segments, positions = inputs(expected)
    batch = {"tokens": tokens, "segments": segments, "positions": positions}
    n_scored = int((segments[:, 1:] > 0).sum())
    model = Gemma3(a, **form)
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: -jnp.sum(model.token_logprobs(p, batch)) / n_scored))(params)
    assert float(loss) == pytest.approx(float(expected["loss_mean_nll"]), abs=1e-5)
    ours = grad_norms(gradient, a)
    assert set(ours) == set(expected["grad_names"])
    theirs = dict(zip(expected["grad_names"].tolist(), expected["grad_norms"].tolist(), strict=True))
    for name, norm in theirs.items():
        assert ours[name] == pytest.approx(norm, rel=1e-4, abs=1e-5), name


SMALL = Architecture(
    vocab_size=64, width=32, ff_width=48, layers=7, heads=4, kv_heads=2, head_width=8, query_scale=8**-0.5, window=5
)


def small(seed=0):
    model = Gemma3(SMALL)
    params = {"model": jax.device_put(model.initialise(seed), may_alias=False)}
    norms = jax.tree_util.tree_map_with_path(
        lambda path, x: 0.3 * jax.random.normal(jax.random.key(7), x.shape) if path[-1].key.endswith("norm") else x,
        params,
    )
    return model, norms


def test_padding_on_either_side_changes_nothing():
    model, params = small()
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 64, (1, 12)).astype(np.int32)
    plain = {"tokens": tokens, "segments": np.ones((1, 12), np.int32), "positions": np.arange(12, dtype=np.int32)[None]}
    alone = np.asarray(jax.jit(model.token_logprobs)(params, plain))[0]
    for left, right in [(0, 6), (6, 0), (3, 3)]:
        padded = {name: np.pad(x, ((0, 0), (left, right))) for name, x in plain.items()}
        scores = np.asarray(jax.jit(model.token_logprobs)(params, padded))[0]
        np.testing.assert_allclose(scores[left : left + 12], alone, atol=1e-5)
        assert not scores[:left].any()
        assert not scores[left + 12 :].any()


def test_packed_examples_equal_separate_ones():
    model, params = small()
    rng = np.random.default_rng(1)
    parts = [rng.integers(1, 64, n).astype(np.int32) for n in (9, 4, 7)]
    separate = []
    for part in parts:
        one = {"tokens": part[None], "segments": np.ones((1, len(part)), np.int32)}
        one["positions"] = np.arange(len(part), dtype=np.int32)[None]
        separate.append(np.asarray(jax.jit(model.token_logprobs)(params, one))[0])
    packed = {
        "tokens": np.concatenate([*parts, [0, 0]])[None].astype(np.int32),
        "segments": np.concatenate([*(np.full(len(p), i + 1) for i, p in enumerate(parts)), [0, 0]])[None].astype(
            np.int32
        ),
        "positions": np.concatenate([*(np.arange(len(p)) for p in parts), [0, 0]])[None].astype(np.int32),
    }
    scores = np.asarray(jax.jit(model.token_logprobs)(params, packed))[0]
    np.testing.assert_allclose(scores, np.concatenate([*separate, [0, 0]]), atol=1e-5)


def test_scoring_some_places_alone_gives_their_numbers_and_gradients():
    model, params = small()
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 50, (3, 12)).astype(np.int32)
    batch = {"tokens": tokens, "segments": np.ones_like(tokens), "positions": np.arange(12)[None].repeat(3, 0)}
    batch["positions"] = batch["positions"].astype(np.int32)
    scored = np.array([[5, 6, 7, 8], [2, 3, 0, 0], [11, 0, 0, 0]], np.int32)
    weight = np.zeros((3, 12), np.float32)
    for row, places in enumerate(scored):
        weight[row, places[places > 0]] = rng.normal(size=(places > 0).sum())

    @jax.jit
    @jax.value_and_grad
    def total(params, batch):
        statistics = model.token_statistics(params, batch, 0.7)
        return jnp.sum(weight * (statistics.logprobs + 0.3 * statistics.entropy))

    everywhere, expected = total(params, batch)
    there, gradient = total(params, {**batch, "scored": scored})
    np.testing.assert_allclose(there, everywhere, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), gradient, expected)
    found = model.token_logprobs(params, {**batch, "scored": scored})
    assert np.array_equal(np.asarray(found) != 0, weight != 0)


def test_a_local_layer_sees_exactly_its_window():
    """One local layer: the last token is reached from window - 1 places before it and from no farther."""
    a = Architecture(**{**SMALL.__dict__, "layers": 1})
    model = Gemma3(a)
    params = {"model": jax.device_put(model.initialise(0), may_alias=False)}
    tokens = jnp.arange(1, 13, dtype=jnp.int32)[None]
    segments, positions = jnp.ones_like(tokens), jnp.arange(12, dtype=jnp.int32)[None]
    logits = jax.jit(model.logits)
    before = np.asarray(logits(params, tokens, segments, positions))[0, -1]
    moved = []
    for i in range(12):
        after = np.asarray(logits(params, tokens.at[0, i].set(40), segments, positions))[0, -1]
        moved.append(bool(np.abs(after - before).max() > 1e-6))
    assert moved == [False] * 7 + [True] * 5


def test_bfloat16_compute_stays_near_float32():
    model, params = small()
    batch = {"tokens": np.arange(1, 25, dtype=np.int32)[None], "segments": np.ones((1, 24), np.int32)}
    batch["positions"] = np.arange(24, dtype=np.int32)[None]
    exact = np.asarray(jax.jit(model.token_logprobs)(params, batch))
    rough = np.asarray(jax.jit(Gemma3(SMALL, compute_dtype="bfloat16").token_logprobs)(params, batch))
    assert rough.dtype == np.float32
    assert 1e-6 < np.abs(rough - exact).max() < 0.2


def test_parameter_counts_of_the_published_sizes(shared):
    trees = json.loads((shared / "fixtures" / "gemma3_param_trees.json").read_text())
    sizes = {"270m": (268.1, 640, 2048, 18, 4, 1, 256), "1b": (999.9, 1152, 6912, 26, 4, 1, 256)}
    assert trees
    for millions, width, ff, layers, heads, kv, head in sizes.values():
        a = Architecture(262144, width, ff, layers, heads, kv, head, head**-0.5, 512)
        assert round(Gemma3(a).n_parameters() / 1e6, 1) == millions
