"""What training begins with: a base and, with `model.lora`, an adapter on it; and runs that trained only an adapter.

The checkpoint of such a run holds the adapter and a record of the base. It stands for the base with the adapter added,
so it can be the checkpoint of any other run. Training goes on with its adapter where `model.lora` has the same numbers.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf.errors import CheckpointError
from rlhf.model.checkpoints.stream import Finish, as_read, finish_all
from rlhf.model.gemma3 import Architecture
from rlhf.model.head import abstract_head
from rlhf.model.lora import LoRA, abstract_adapter, draw_adapter, merged
from rlhf.model.peft import WEIGHTS, read_peft
from rlhf.model.quantised import Kind, quantiser
from rlhf.model.sharding import place
from rlhf.train.checkpoint import components, is_run, load_parameters, moved_along, parameters_digest, read_record
from rlhf.train.drawn import Drawn
from rlhf.train.durable import sha256

log = logging.getLogger(__name__)

Tree = dict[str, Any]
Locate = Callable[[str], Any]  # the source (`rlhf.train.sources`) that a text names


@runtime_checkable
class Adapter(Protocol):
    """An adapter that can be loaded.

    label: for the log. lora: its settings. param_dtype, quantisation: of the base it was trained on, where known.
    """

    label: str
    lora: LoRA
    param_dtype: str | None
    quantisation: Kind | None

    def digest(self) -> str: ...

    def load_adapter(self, architecture: Architecture, mesh: Mesh | None) -> Tree: ...


def lora_of(record: dict[str, Any]) -> LoRA | None:
    """The settings of the adapter that a run trained, or None where it trained all parameters."""
    found = record["config"]["model"].get("lora") or {}
    settings = {name: value for name, value in found.items() if name != "_target_"}
    return LoRA(**settings) if settings.get("rank") is not None else None


def load_head(path: Path, architecture: Architecture, mesh: Mesh | None) -> Tree:
    """The component `head` of a run that trained a reward model; nothing of another run.

    What else a run trained beside its policy, such as a critic, is of use to itself alone, and the log says so.
    """
    there = set(components(path))
    if others := there - {"model", "vision", "adapter", "head"}:
        log.info("%s of %s: not read", ", ".join(sorted(others)), path)
    if "head" not in there:
        return {}
    tree, _ = load_parameters(path, target={"head": abstract_head(architecture.width)})
    return place(tree, mesh)


class PeftFolder:
    """A folder in the form of the peft library. See `Adapter`."""

    param_dtype: str | None = None
    quantisation: Kind | None = None

    def __init__(self, folder: Path, architecture: Architecture):
        self.folder, self.label = folder.resolve(), str(folder.resolve())
        self.lora, self._arrays = read_peft(folder, architecture)

    def digest(self) -> str:
        return sha256(self.folder / WEIGHTS)

    def load_adapter(self, architecture: Architecture, mesh: Mesh | None) -> Tree:
        return place(jax.tree.map(jnp.asarray, self._arrays), mesh)


class AdapterRun:
    """A run that trained an adapter: as a source, its base with the adapter added; and an `Adapter`."""

    needs_tokenizer = False

    def __init__(self, path: Path, tokenizer: Path | None, locate: Locate):
        self.path, self.tokenizer, self._locate = path.resolve(), tokenizer, locate
        self.pinned = self.label = str(self.path)
        self.record = read_record(self.path)
        lora = lora_of(self.record)
        assert lora is not None
        self.lora = lora
        self.quantisation: Kind | None = self.record["config"]["model"].get("base_quantisation")
        self.param_dtype: str | None = self.stored_dtype()

    def base(self, architecture: Architecture) -> Any:
        """The source of the base.

        Raises:
            CheckpointError: it is not what it was.
        """
        begun, adapter = self.record["started_from"], self.record["config"]["model"].get("adapter")
        hint = f"model.checkpoint=BASE model.adapter={self.path} takes the base from another place"
        try:
            source = Drawn(self.record["seed"]) if begun is None else self._locate(moved_along(begun, self.path))
            base = begin(source, self.lora, None, adapter, architecture, self._locate).base
        except CheckpointError as error:
            raise CheckpointError(f"the base of {self.path}: {error}; {hint}") from error
        if base.digest() != self.record["base"]:
            raise CheckpointError(
                f"{self.path} trained an adapter on {base.pinned or base.label}, whose parameters have changed since; "
                f"{hint}"
            )
        return base

    def digest(self) -> str:
        parts = (parameters_digest(self.path), self.record["base"], self.quantisation)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def stored_dtype(self) -> str:
        return self.record["config"]["hardware"]["param_dtype"]

    def load(self, architecture: Architecture, dtype: str, mesh: Mesh | None, finish: Finish = as_read) -> Tree:
        merged_base = Merged(self.base(architecture), self).load(architecture, dtype, mesh, finish)
        return merged_base | load_head(self.path, architecture, mesh)

    def load_adapter(self, architecture: Architecture, mesh: Mesh | None) -> Tree:
        tree, record = load_parameters(self.path, target={"adapter": abstract_adapter(architecture, self.lora)})
        log.info("adapter: run %s, step %s", self.path, record["step"])
        return place(tree, mesh)["adapter"]


@dataclasses.dataclass(frozen=True)
class Merged:
    """A source: a base with an adapter added, as its training saw it (its number type, quantised and made plain)."""

    source: Any
    adapter: Adapter

    needs_tokenizer = False

    @property
    def pinned(self) -> str | None:
        return self.source.pinned

    @property
    def label(self) -> str:
        return f"{self.source.pinned} with {self.adapter.label}"

    @property
    def tokenizer(self) -> Path | None:
        return self.source.tokenizer

    def digest(self) -> str:
        parts = (self.source.digest(), self.adapter.digest(), self.adapter.quantisation)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def stored_dtype(self) -> str:
        return self.source.stored_dtype()

    def load(self, architecture: Architecture, dtype: str, mesh: Mesh | None, finish: Finish = as_read) -> Tree:
        kind = self.adapter.quantisation
        as_trained = as_read if kind is None else quantiser(kind)
        parts = self.source.load(architecture, self.adapter.param_dtype or dtype, mesh, as_trained)
        parts.pop("head", None)  # of the base alone
        model = parts.pop("model")
        change = self.adapter.load_adapter(architecture, mesh)
        log.info("the adapter of %s is merged into its base", self.adapter.label)
        others = jax.tree.map(lambda x: x.astype(dtype), parts)
        tree = place({"model": merged(model, change, self.adapter.lora.scale, dtype), **others}, mesh)
        return finish_all(tree, finish)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    base: the source of the parameters. lora: settings of the adapter to train, None to train all parameters.
    adapter: the one that training goes on with; None: a new one, or none.
    """

    base: Any
    lora: LoRA | None
    quantisation: Kind | None
    adapter: Adapter | None = None

    def identity(self) -> dict[str, str]:
        """What tells the parameters at the start from any others, as text by name."""
        found = {"parameters": self.base.digest()}
        if self.quantisation is not None:
            found["base_quantisation"] = self.quantisation
        return found if self.adapter is None else {**found, "adapter": self.adapter.digest()}

    def load_base(self, architecture: Architecture, dtype: str, mesh: Mesh | None) -> Tree:
        """The components of the base."""
        if self.quantisation is None:
            return self.base.load(architecture, dtype, mesh)
        log.info("base: matrices of the layers in %s", self.quantisation)
        return place(self.base.load(architecture, dtype, mesh, quantiser(self.quantisation)), mesh)

    def adapter_components(self, architecture: Architecture, seed: int, mesh: Mesh | None) -> Tree:
        """The adapter that is trained (the one to go on with, or a new one) and its numbers; nothing without one."""
        lora = self.lora
        if lora is None:
            return {}
        what = f"rank {lora.rank}, scale {lora.scale:g}, on {' '.join(lora.projections)}"
        log.info("adapter: %s, %s", "new" if self.adapter is None else f"that of {self.adapter.label}", what)
        if self.adapter is None:
            adapter = place(draw_adapter(jax.random.key(seed), architecture, lora), mesh)
        else:
            adapter = self.adapter.load_adapter(architecture, mesh)
        dropout = {"adapter_dropout": jnp.float32(lora.dropout)} if lora.dropout else {}
        head = load_head(self.adapter.path, architecture, mesh) if isinstance(self.adapter, AdapterRun) else {}
        return {"adapter": adapter, "adapter_scale": jnp.float32(lora.scale), **dropout, **head}

    def require_same_base(self, run: Path) -> None:
        """Refuse to go on with a run, if it has a checkpoint, whose adapter was trained on other parameters.

        Raises:
            CheckpointError
        """
        if is_run(run) and read_record(run)["base"] != self.base.digest():
            where = self.base.pinned or self.base.label
            raise CheckpointError(f"{run} can't go on: the parameters of {where} have changed since")


def begin(
    source: Any,
    lora: LoRA | None,
    quantisation: Kind | None,
    adapter: str | None,
    architecture: Architecture,
    locate: Locate,
) -> Beginning:
    """What a run begins with.

    source: of `model.checkpoint`. adapter: text of `model.adapter`, which is put on the source.

    Raises:
        CheckpointError: an adapter is missing, damaged, of another model, or its base has changed.
    """
    if adapter is not None:
        found = find_adapter(adapter, architecture, locate)
        _compare_bases(found, source)
        if _goes_on(found, lora):
            return Beginning(source, lora, quantisation, found)
        return Beginning(Merged(source, found), lora, quantisation)
    if isinstance(source, AdapterRun) and _goes_on(source, lora):
        return Beginning(source.base(architecture), lora, quantisation, source)
    return Beginning(source, lora, quantisation)


def find_adapter(text: str, architecture: Architecture, locate: Locate) -> Adapter:
    """The adapter that `model.adapter` names: a peft folder, a run that trained one, or a repository of the Hub."""
    path = Path(text).expanduser()
    if not path.exists():
        return PeftFolder(fetch_adapter(text), architecture)
    if (path / WEIGHTS).exists():
        return PeftFolder(path, architecture)
    try:
        source = locate(text)
    except CheckpointError:
        source = None
    if not isinstance(source, AdapterRun):
        raise CheckpointError(f"model.adapter={text}: expected a folder with {WEIGHTS}, or a run with model.lora")
    return source


def fetch_adapter(text: str) -> Path:
    """The folder of an adapter on the Hub, from the cache or fetched now.

    Raises:
        ConfigError: the text is no path and no repository. CheckpointError: it can't be had; says why.
    """
    from huggingface_hub import snapshot_download

    from rlhf.errors import ConfigError
    from rlhf.model.checkpoints import hub
    from rlhf.model.checkpoints.handles import HubHandle, parse
    from rlhf.model.peft import CONFIG

    try:
        handle = parse(text)
    except ConfigError:
        handle = None
    if not isinstance(handle, HubHandle):
        raise ConfigError(f"model.adapter={text}: there is no such folder, and it is no repository (owner/name)")
    try:
        folder = snapshot_download(handle.repository, revision=handle.revision, allow_patterns=[CONFIG, WEIGHTS])
    except Exception as error:  # the client raises many kinds
        raise CheckpointError(f"model.adapter={text}: {hub.explain(error, handle)[0]}") from error
    hub.verify(Path(folder))
    return Path(folder)


def _goes_on(adapter: Adapter, lora: LoRA | None) -> bool:
    """Whether training goes on with an adapter; if not, it is merged."""
    if lora is None:
        return False
    if lora.is_like(adapter.lora):
        return True
    log.info(
        "model.lora is not that of %s (rank %d, scale %g, %s there; rank %d, scale %g, %s here): a new adapter",
        adapter.label, adapter.lora.rank, adapter.lora.scale, ",".join(adapter.lora.projections),
        lora.rank, lora.scale, ",".join(lora.projections),
    )  # fmt: skip
    return False


def _compare_bases(adapter: Adapter, source: Any) -> None:
    """Say so where an adapter was trained on other parameters: the user may know that they are the same."""
    if isinstance(adapter, AdapterRun) and adapter.record["base"] != source.digest():
        log.warning("the adapter of %s was trained on other parameters than %s", adapter.label, source.pinned)
