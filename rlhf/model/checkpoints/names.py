"""Which array of a checkpoint is which of our parameters: one table for each world, read in both directions.

Names are in a plain form here: `layer_{}/attn/q_einsum/w` (Orbax, nested) and `layers.{}.self_attn.q_proj.weight`
(Hugging Face, without what stands in front). The many spellings of files are brought to it by `orbax` and
`safetensors`. How the arrays lie was read from google-deepmind/gemma 3.3.0 and transformers 5.23.0.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax

from rlhf.model.checkpoints.axes import Rule, Sizes, rule
from rlhf.model.gemma3 import Architecture

Shapes = dict[tuple[str, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a table: arrays of this name, `{}` being the layer, fill the leaf at this path by this rule."""

    name: str
    leaf: tuple[str, ...]
    rule: Rule

    @property
    def is_stacked(self) -> bool:
        return "{}" in self.name


def _table(prefix: str, component: str, rows: str) -> tuple[Entry, ...]:
    entries = []
    for row in rows.strip().splitlines():
        name, leaf, text = (cell.strip() for cell in row.split("|"))
        path = (component, "layers", leaf) if "{}" in name else (component, leaf)
        entries.append(Entry(prefix + name, path, rule(text)))
    return tuple(entries)


ORBAX_TEXT = _table(
    "",
    "model",
    """
    embedder/input_embedding                 | embedding           | V D -> V D
    layer_{}/pre_attention_norm/scale        | attention_norm      | D -> D
    layer_{}/attn/q_einsum/w                 | query               | H D h -> D H h
    layer_{}/attn/kv_einsum/w                | key_value           | P K D h -> D P K h
    layer_{}/attn/_query_norm/scale          | query_norm          | h -> h
    layer_{}/attn/_key_norm/scale            | key_norm            | h -> h
    layer_{}/attn/attn_vec_einsum/w          | out                 | H h D -> H h D
    layer_{}/post_attention_norm/scale       | post_attention_norm | D -> D
    layer_{}/pre_ffw_norm/scale              | mlp_norm            | D -> D
    layer_{}/mlp/gating_einsum/w             | gate_up             | P F D -> D P F
    layer_{}/mlp/linear/w                    | down                | F D -> F D
    layer_{}/post_ffw_norm/scale             | post_mlp_norm       | D -> D
    final_norm/scale                         | final_norm          | D -> D
    """,
)

ORBAX_VISION = _table(
    "",
    "vision",
    """
    embedder/mm_soft_embedding_norm/scale    | soft_norm           | W -> W
    embedder/mm_input_projection/w           | project             | W D -> W D
    """,
) + _table(
    "vision_encoder/siglip_encoder/",
    "vision",
    """
    embedding/kernel                                                     | patch_kernel         | p q c W -> p q c W
    embedding/bias                                                       | patch_bias           | W -> W
    pos_embedding                                                        | position             | U N W -> N W
    Transformer/encoderblock_{}/LayerNorm_0/scale                        | attention_norm_scale | W -> W
    Transformer/encoderblock_{}/LayerNorm_0/bias                         | attention_norm_bias  | W -> W
    Transformer/encoderblock_{}/MultiHeadDotProductAttention_0/query/kernel | query_key_value   | W A w -> W 0 A w
    Transformer/encoderblock_{}/MultiHeadDotProductAttention_0/key/kernel   | query_key_value   | W A w -> W 1 A w
    Transformer/encoderblock_{}/MultiHeadDotProductAttention_0/value/kernel | query_key_value   | W A w -> W 2 A w
    Transformer/encoderblock_{}/MultiHeadDotProductAttention_0/query/bias   | query_key_value_bias | A w -> 0 A w
    Transformer/encoderblock_{}/MultiHeadDotProductAttention_0/key/bias     | query_key_value_bias | A w -> 1 A w
    Transformer/encoderblock_{}/MultiHeadDotProductAttention_0/value/bias   | query_key_value_bias | A w -> 2 A w
    Transformer/encoderblock_{}/MultiHeadDotProductAttention_0/out/kernel   | out               | A w W -> A w W
    Transformer/encoderblock_{}/MultiHeadDotProductAttention_0/out/bias     | out_bias          | W -> W
    Transformer/encoderblock_{}/LayerNorm_1/scale                        | mlp_norm_scale       | W -> W
    Transformer/encoderblock_{}/LayerNorm_1/bias                         | mlp_norm_bias        | W -> W
    Transformer/encoderblock_{}/MlpBlock_0/Dense_0/kernel                | up                   | W M -> W M
    Transformer/encoderblock_{}/MlpBlock_0/Dense_0/bias                  | up_bias              | M -> M
    Transformer/encoderblock_{}/MlpBlock_0/Dense_1/kernel                | down                 | M W -> M W
    Transformer/encoderblock_{}/MlpBlock_0/Dense_1/bias                  | down_bias            | W -> W
    Transformer/encoder_norm/scale                                       | final_norm_scale     | W -> W
    Transformer/encoder_norm/bias                                        | final_norm_bias      | W -> W
    """,
)

HF_TEXT = _table(
    "",
    "model",
    """
    embed_tokens.weight                              | embedding           | V D -> V D
    layers.{}.input_layernorm.weight                 | attention_norm      | D -> D
    layers.{}.self_attn.q_proj.weight                | query               | (H h) D -> D H h
    layers.{}.self_attn.k_proj.weight                | key_value           | (K h) D -> D 0 K h
    layers.{}.self_attn.v_proj.weight                | key_value           | (K h) D -> D 1 K h
    layers.{}.self_attn.q_norm.weight                | query_norm          | h -> h
    layers.{}.self_attn.k_norm.weight                | key_norm            | h -> h
    layers.{}.self_attn.o_proj.weight                | out                 | D (H h) -> H h D
    layers.{}.post_attention_layernorm.weight        | post_attention_norm | D -> D
    layers.{}.pre_feedforward_layernorm.weight       | mlp_norm            | D -> D
    layers.{}.mlp.gate_proj.weight                   | gate_up             | F D -> D 0 F
    layers.{}.mlp.up_proj.weight                     | gate_up             | F D -> D 1 F
    layers.{}.mlp.down_proj.weight                   | down                | D F -> F D
    layers.{}.post_feedforward_layernorm.weight      | post_mlp_norm       | D -> D
    norm.weight                                      | final_norm          | D -> D
    """,
)

HF_VISION = _table(
    "multi_modal_projector.",
    "vision",
    """
    mm_soft_emb_norm.weight                          | soft_norm           | W -> W
    mm_input_projection_weight                       | project             | W D -> W D
    """,
) + _table(
    "vision_tower.",
    "vision",
    """
    embeddings.patch_embedding.weight                | patch_kernel         | W c p q -> p q c W
    embeddings.patch_embedding.bias                  | patch_bias           | W -> W
    embeddings.position_embedding.weight             | position             | N W -> N W
    encoder.layers.{}.layer_norm1.weight             | attention_norm_scale | W -> W
    encoder.layers.{}.layer_norm1.bias               | attention_norm_bias  | W -> W
    encoder.layers.{}.self_attn.q_proj.weight        | query_key_value      | (A w) W -> W 0 A w
    encoder.layers.{}.self_attn.k_proj.weight        | query_key_value      | (A w) W -> W 1 A w
    encoder.layers.{}.self_attn.v_proj.weight        | query_key_value      | (A w) W -> W 2 A w
    encoder.layers.{}.self_attn.q_proj.bias          | query_key_value_bias | (A w) -> 0 A w
    encoder.layers.{}.self_attn.k_proj.bias          | query_key_value_bias | (A w) -> 1 A w
    encoder.layers.{}.self_attn.v_proj.bias          | query_key_value_bias | (A w) -> 2 A w
    encoder.layers.{}.self_attn.out_proj.weight      | out                  | W (A w) -> A w W
    encoder.layers.{}.self_attn.out_proj.bias        | out_bias             | W -> W
    encoder.layers.{}.layer_norm2.weight             | mlp_norm_scale       | W -> W
    encoder.layers.{}.layer_norm2.bias               | mlp_norm_bias        | W -> W
    encoder.layers.{}.mlp.fc1.weight                 | up                   | M W -> W M
    encoder.layers.{}.mlp.fc1.bias                   | up_bias              | M -> M
    encoder.layers.{}.mlp.fc2.weight                 | down                 | W M -> M W
    encoder.layers.{}.mlp.fc2.bias                   | down_bias            | W -> W
    post_layernorm.weight                            | final_norm_scale     | W -> W
    post_layernorm.bias                              | final_norm_bias      | W -> W
    """,
)

WORLDS = {"orbax": (ORBAX_TEXT, ORBAX_VISION), "hf": (HF_TEXT, HF_VISION)}

# letters of the rules -> the key of the config that is this size, for messages
KEYS = {
    "V": "model.vocab_size",
    "D": "model.width",
    "F": "model.ff_width",
    "H": "model.heads",
    "K": "model.kv_heads",
    "h": "model.head_width",
    "W": "model.vision.width",
    "M": "model.vision.ff_width",
    "A": "model.vision.heads",
    "p": "model.vision.patch",
}


def sizes(a: Architecture) -> Sizes:
    """What the letters stand for. P: two of a kind; q: p again; c: colours; U: an axis of size 1; N: patches."""
    text = {"V": a.vocab_size, "D": a.width, "F": a.ff_width, "H": a.heads, "K": a.kv_heads, "h": a.head_width, "P": 2}
    if a.vision is None:
        return text
    v = a.vision
    seen = {"W": v.width, "M": v.ff_width, "A": v.heads, "w": v.width // v.heads, "N": v.grid**2}
    return text | seen | {"p": v.patch, "q": v.patch, "c": 3, "U": 1}


@dataclasses.dataclass(frozen=True)
class Slot:
    """An array that a checkpoint has to hold: its plain name, row of the table, and layer (None where there is one)."""

    name: str
    entry: Entry
    layer: int | None


def slots(world: str, a: Architecture) -> Iterator[Slot]:
    """Every array that a checkpoint of this architecture holds, leaf by leaf."""
    text, vision = WORLDS[world]
    for entry in text if a.vision is None else text + vision:
        n_layers = a.vision.layers if entry.leaf[0] == "vision" and a.vision is not None else a.layers
        for layer in range(n_layers) if entry.is_stacked else [None]:
            yield Slot(entry.name if layer is None else entry.name.format(layer), entry, layer)


def leaf_shapes(a: Architecture) -> Shapes:
    """Our leaves, by their path from the component's name."""
    tree: Any = {"model": a.shapes()}
    if a.vision is not None:
        tree["vision"] = a.vision.shapes(a.width)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {tuple(key.key for key in path): shape for path, shape in flat}


def nested(flat: dict[tuple[str, ...], Any]) -> Any:
    """A tree of values given by their paths."""
    tree: dict[str, Any] = {}
    for (*parents, name), value in flat.items():
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[name] = value
    return tree
