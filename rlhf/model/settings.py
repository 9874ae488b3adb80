"""The keys under `model`: which architecture, which parameters, which tokenizer."""

import dataclasses

from rlhf.config import config, require_range
from rlhf.errors import ConfigError
from rlhf.model.gemma3 import Architecture


@config
class ModelSettings:
    """The numbers of an `Architecture`, and where parameters and tokenizer come from (conf/model explains each)."""

    vocab_size: int
    width: int
    ff_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    query_scale: float
    window: int
    pattern: int = 6
    rope_base_local: float = 10_000.0
    rope_base_global: float = 1_000_000.0
    rope_scale: float = 1.0
    eps: float = 1e-6
    checkpoint: str | None = None
    tokenizer: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(Architecture):
            require_range(self, field.name, above=0)
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_width % 2:
            raise ConfigError(f"head_width={self.head_width} must be even: rotary positions turn its two halves")

    def architecture(self) -> Architecture:
        return Architecture(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Architecture)})
