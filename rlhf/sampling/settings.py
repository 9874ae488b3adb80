"""How generation uses the machine; what is generated does not depend on it, but for rounding."""

from typing import Literal

from rlhf.config import config, require_range
from rlhf.sampling.weights import Kind


@config
class SamplingSettings:
    """See conf/config.yaml for the meaning of each key."""

    slots: int = 64
    weights: Kind | None = None
    cache_dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self):
        require_range(self, "slots", at_least=1)
