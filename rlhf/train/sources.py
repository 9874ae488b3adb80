"""Where parameters can come from: a run of ours, or a checkpoint of another library, here or to be fetched."""

import functools
import hashlib
import logging
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf.errors import CheckpointError
from rlhf.model.checkpoints import digests, download, hf_config, stream
from rlhf.model.checkpoints.arrays import Arrays
from rlhf.model.checkpoints.find import Found, find
from rlhf.model.checkpoints.handles import parse
from rlhf.model.checkpoints.names import leaf_shapes, nested
from rlhf.model.checkpoints.stream import Finish, as_read, finish_all
from rlhf.model.gemma3 import Architecture
from rlhf.model.sharding import with_shardings
from rlhf.train.adapters import AdapterRun, load_head, lora_of
from rlhf.train.checkpoint import (
    components,
    is_run,
    load_parameters,
    moved_along,
    parameters_digest,
    read_record,
    run_folder,
)
from rlhf.train.drawn import Drawn

log = logging.getLogger(__name__)

Tree = dict[str, Any]

_TOKENIZER = "tokenizer.model"


@runtime_checkable
class Source(Protocol):
    """Parameters that can be loaded.

    pinned: text that finds the same ones again, from any folder. tokenizer: the one that belongs to them, if it is
    there. needs_tokenizer: without one, they are of no use; a run without one has the embedded tokenizer.
    """

    pinned: str
    tokenizer: Path | None
    needs_tokenizer: bool

    def digest(self) -> str:
        """What tells these parameters from any others."""
        ...

    def stored_dtype(self) -> str:
        """The type that the parameters have in the checkpoint."""
        ...

    def load(self, architecture: Architecture, dtype: str, mesh: Mesh | None, finish: Finish = as_read) -> Tree:
        """The components `model` and, where the architecture has one, `vision`, in `dtype` on their shards; and `head`,
        if it is a reward model.

        finish: what each leaf becomes as soon as it is there, given its path from the component's name.

        Raises:
            CheckpointError: they are of another model, incomplete or damaged.
        """
        ...


def locate(checkpoint: str, timeout_seconds: float = 120.0) -> Source:
    """What a `model.checkpoint` is. A path that exists is that path; anything else is fetched, unless it was before.

    timeout_seconds: without a byte, after which a download is given up.

    Raises:
        ConfigError: it is neither a path nor a handle.
        CheckpointError: there is no checkpoint at the path, or the handle can't be fetched.
    """
    path = Path(checkpoint).expanduser()
    if path.exists():
        return _run_source(path) if is_run(path) else FileSource(find(path), str(path.resolve()))
    folder, handle = download.local(parse(checkpoint), timeout_seconds)
    pinned = download.pinned(handle)
    return FileSource(find(folder), pinned, hashlib.sha256(pinned.encode()).hexdigest())


def _run_source(path: Path) -> Source:
    run = RunSource(path)
    return run if lora_of(read_record(run.path)) is None else AdapterRun(run.path, run.tokenizer, locate)


class RunSource:
    """The newest checkpoint of a run, or one of its checkpoints. See `Source`."""

    needs_tokenizer = False

    def __init__(self, path: Path):
        self.path = path.resolve()
        self.pinned = str(self.path)
        tokenizer = run_folder(self.path) / _TOKENIZER
        self.tokenizer = tokenizer if tokenizer.is_file() else None

    def digest(self) -> str:
        return parameters_digest(self.path)

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What the run says about itself."""
        return read_record(self.path)

    def stored_dtype(self) -> str:
        return self.record["config"]["hardware"]["param_dtype"]

    def load(self, architecture: Architecture, dtype: str, mesh: Mesh | None, finish: Finish = as_read) -> Tree:
        """What the run did not train, such as a frozen tower, is that of the checkpoint it started from."""
        wanted = leaf_shapes(architecture)
        there = set(components(self.path))
        if "model" not in there:
            raise CheckpointError(f"{self.path} holds only {', '.join(sorted(there))}: it is no model by itself")
        stored = jnp.dtype(self.stored_dtype())
        target = {path: jax.ShapeDtypeStruct(shape, stored) for path, shape in wanted.items() if path[0] in there}
        placed = nested(target) if mesh is None else with_shardings(nested(target), mesh)
        tree, record = load_parameters(
            self.path, target=placed, finish=lambda path, leaf: finish(tuple(map(str, path[1:])), leaf.astype(dtype))
        )
        log.info("parameters: run %s, step %s", self.path, record["step"])
        tree |= load_head(self.path, architecture, mesh)
        if missing := {path[0] for path in wanted} - there:
            tree |= finish_all(self._frozen(missing, architecture, dtype, mesh), finish)
        return tree

    def _frozen(self, names: set[str], architecture: Architecture, dtype: str, mesh: Mesh | None) -> Tree:
        base = self.record["started_from"]
        log.info("%s: as in %s, where the run started", ", ".join(sorted(names)), base or "its random parameters")
        start = Drawn(self.record["config"]["seed"]) if base is None else locate(moved_along(base, self.path))
        tree = start.load(architecture, dtype, mesh)
        return {name: tree[name] for name in names}


class FileSource:
    """A checkpoint of another library. See `Source`. identity: a digest, where it needs no reading of the files."""

    needs_tokenizer = True

    def __init__(self, found: Found, pinned: str, identity: str | None = None):
        self.found, self.pinned, self.identity = found, pinned, identity
        self.tokenizer = found.tokenizer

    @functools.cached_property
    def arrays(self) -> Arrays:
        return self.found.open()

    def stored_dtype(self) -> str:
        return next(iter(self.arrays.stored(with_vision=False).values())).dtype

    @functools.cached_property
    def _files_digest(self) -> str:
        root = self.found.path if self.found.path.is_dir() else self.found.path.parent
        return digests.of_files(self.found.files(), root)

    def digest(self) -> str:
        return self.identity or self._files_digest

    def load(self, architecture: Architecture, dtype: str, mesh: Mesh | None, finish: Finish = as_read) -> Tree:
        path, config = self.found.path, self.found.config
        log.info(
            "parameters: %s, from %s", self.arrays.kind, path if self.identity is None else f"{self.pinned} ({path})"
        )
        if config is not None:
            hf_config.require_same(config, architecture)
        elif path.is_file():
            log.warning("no config.json beside %s: window, scales and bases are not compared with model.*", path)
        return stream.load(self.arrays, architecture, dtype, mesh, finish)
