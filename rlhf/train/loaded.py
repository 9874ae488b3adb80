"""A model beside the one that is trained, loaded from its checkpoint: a judge, a reward model."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from rlhf.data.encode import Prompt
from rlhf.errors import CheckpointError
from rlhf.model.chat import ChatTemplate, Message
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.settings import ModelSettings
from rlhf.model.tokenizer import Tokenizer
from rlhf.model.vision import Vision
from rlhf.sampling.methods import Greedy
from rlhf.sampling.sampler import Sampler
from rlhf.sampling.settings import SamplingSettings
from rlhf.train.adapters import AdapterRun
from rlhf.train.checkpoint import components, load_parameters
from rlhf.train.hardware import Hardware
from rlhf.train.sources import locate

log = logging.getLogger(__name__)

_PARAMETERS = ("model", "vision", "adapter", "adapter_scale", "adapter_dropout")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """params: the components `model` and, where it sees, `vision`; an adapter is merged. others: what the checkpoint of
    a run holds besides (a head), as numpy arrays. sampler: answers prompts with `params`. identity: tells the
    parameters from any others."""

    model: Gemma3
    params: dict[str, Any]
    others: dict[str, Any]
    tokenizer: Tokenizer
    sampler: Sampler
    mesh: Mesh | None
    identity: str

    def answer(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers to texts, each a conversation of one message."""
        template = ChatTemplate(self.tokenizer)
        prompts = [
            Prompt(tuple(template.prompt([Message("user", text)])), None, {}, row) for row, text in enumerate(texts)
        ]
        return self.sampler(self.params, prompts, method=Greedy(), max_new_tokens=max_new_tokens).texts


def load_model(checkpoint: str, like: ModelSettings, hardware: Hardware, mesh: Mesh | None) -> Loaded:
    """Any checkpoint that `model.checkpoint` takes.

    like: the architecture of checkpoints that are no run of ours; a run's own config says what its is.

    Raises:
        CheckpointError: it is missing, damaged, of another architecture, or has no tokenizer.
    """
    source: Any = locate(checkpoint, like.download_timeout)
    record = getattr(source, "record", None)
    architecture = like.architecture() if record is None else stored_architecture(record["config"]["model"])
    if source.tokenizer is None and source.needs_tokenizer:
        raise CheckpointError(f"{checkpoint} has no tokenizer.model beside it")
    log.info("beside the model that is trained: %s", checkpoint)
    tokenizer = Tokenizer(source.tokenizer)
    model = hardware.model(architecture, mesh)
    params = source.load(architecture, hardware.param_dtype, mesh)
    others = {} if record is None else _others(source)
    return Loaded(
        model, params, others, tokenizer, Sampler(model, tokenizer, SamplingSettings()), mesh, source.digest()
    )


def _others(source: Any) -> dict[str, Any]:
    path = source.path
    if isinstance(source, AdapterRun) or set(components(path)) - set(_PARAMETERS):
        tree, _ = load_parameters(path)
        return {name: part for name, part in tree.items() if name not in _PARAMETERS}
    return {}


def stored_architecture(stored: dict[str, Any]) -> Architecture:
    """The architecture that the model section of a run's config describes; nothing in it is run."""
    numbers = {f.name: stored[f.name] for f in dataclasses.fields(Architecture) if f.name in stored}
    if numbers.get("vision") is not None:
        numbers["vision"] = Vision(**{f.name: stored["vision"][f.name] for f in dataclasses.fields(Vision)})
    return Architecture(**numbers)
