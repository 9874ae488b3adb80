"""The keys under `model`: which architecture, which parameters, which tokenizer."""

import dataclasses

from rlhf.config import config, require_range
from rlhf.errors import ConfigError
from rlhf.model.gemma3 import Architecture
from rlhf.model.lora import LoRA
from rlhf.model.quantised import Kind
from rlhf.model.vision import Vision


@config
class VisionSettings:
    """The numbers of a `Vision` tower (conf/model explains each)."""

    image_size: int
    patch: int
    width: int
    ff_width: int
    layers: int
    heads: int
    tokens_per_image: int
    eps: float = 1e-6

    def __post_init__(self):
        for field in dataclasses.fields(Vision):
            require_range(self, field.name, above=0)
        if self.image_size % self.patch:
            raise ConfigError(f"image_size={self.image_size} must be a multiple of patch={self.patch}")
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} must be a multiple of heads={self.heads}")
        side, grid = round(self.tokens_per_image**0.5), self.image_size // self.patch
        if side**2 != self.tokens_per_image or grid % side:
            squares = ", ".join(str(n * n) for n in range(1, grid + 1) if grid % n == 0)
            raise ConfigError(
                f"tokens_per_image={self.tokens_per_image} must divide the {grid} × {grid} patches of an image into "
                f"equal squares: one of {squares}"
            )

    def architecture(self) -> Vision:
        return Vision(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Vision)})


@config
class ModelSettings:
    """The numbers of an `Architecture`, and where parameters and tokenizer come from (conf/model explains each).

    vision: the tower that sees images; null: the model reads text only.
    train_vision: whether the tower, its norm and its projection are trained too.
    lora: the adapter to train instead of all parameters. adapter: one to begin with, put on the checkpoint.
    base_quantisation: how the matrices of a base that is not trained are kept.
    """

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
    download_timeout: float = 120.0
    tokenizer: str | None = None
    vision: VisionSettings | None = None
    train_vision: bool = False
    lora: LoRA | None = None
    adapter: str | None = None
    base_quantisation: Kind | None = None

    def __post_init__(self):
        for field in dataclasses.fields(Architecture):
            if field.name != "vision":
                require_range(self, field.name, above=0)
        require_range(self, "download_timeout", above=0)
        if self.train_vision and self.vision is None:
            raise ConfigError("train_vision=true needs model.vision: this model reads text only")
        if self.train_vision and self.trained_lora is not None:
            raise ConfigError("train_vision=true needs model.lora.rank=null: beside an adapter nothing else is trained")
        if self.base_quantisation is not None and self.trained_lora is None:
            raise ConfigError(
                f"base_quantisation={self.base_quantisation} needs model.lora.rank: codes can't be trained, only an "
                "adapter on them"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_width % 2:
            raise ConfigError(f"head_width={self.head_width} must be even: rotary positions turn its two halves")

    @property
    def trained_lora(self) -> LoRA | None:
        """Settings of the adapter to train; None where all parameters are."""
        return None if self.lora is None or self.lora.rank is None else self.lora

    def architecture(self) -> Architecture:
        numbers = {f.name: getattr(self, f.name) for f in dataclasses.fields(Architecture)}
        return Architecture(**numbers | {"vision": None if self.vision is None else self.vision.architecture()})
