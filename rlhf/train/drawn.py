"""Random parameters as a source (`rlhf.train.sources`)."""

import logging
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf.model.checkpoints.stream import Finish, as_read, finish_all
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.sharding import place

log = logging.getLogger(__name__)


class Drawn:
    """The same for a seed and an architecture, whatever the mesh is."""

    pinned = None
    tokenizer = None
    needs_tokenizer = False

    def __init__(self, seed: int):
        self.seed = seed
        self.label = f"random, seed {seed}"

    def digest(self) -> str:
        return self.label

    def stored_dtype(self) -> str:
        return "float32"

    def load(
        self, architecture: Architecture, dtype: str, mesh: Mesh | None, finish: Finish = as_read
    ) -> dict[str, Any]:
        log.info("parameters: %s", self.label)
        drawn = Gemma3(architecture).initialise_components(self.seed, dtype)
        tree = jax.device_put(drawn, may_alias=False) if mesh is None else place(drawn, mesh)
        jax.block_until_ready(tree)  # else the host's arrays would live on beside what is made next
        return finish_all(tree, finish)
