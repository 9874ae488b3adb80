"""The models that contenders run. Needs nothing but Python: the peers live in other environments."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    vocab: int
    width: int
    ff_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    window: int

    @property
    def layer_types(self) -> list[str]:
        """As transformers names them."""
        is_global = (i % PATTERN == PATTERN - 1 for i in range(self.layers))
        return ["full_attention" if whole else "sliding_attention" for whole in is_global]


PATTERN = 6
ROPE_BASE_LOCAL = 10_000.0
ROPE_BASE_GLOBAL = 1_000_000.0

SIZES = {
    "tiny": Size(vocab=4096, width=256, ff_width=1024, layers=6, heads=4, kv_heads=1, head_width=64, window=128),
    "270m": Size(vocab=262_144, width=640, ff_width=2048, layers=18, heads=4, kv_heads=1, head_width=256, window=512),
}
