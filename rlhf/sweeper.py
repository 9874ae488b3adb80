"""How Hydra composes the jobs of a sweep."""

import contextlib
from collections.abc import Iterator
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig

from rlhf.overrides import with_whole_values


@contextlib.contextmanager
def composed_once() -> Iterator[None]:
    """Meanwhile each job of a sweep is composed once, and a whole object takes the place of another.

    Hydra composes all jobs before the first runs, so that none fails over a mistake in its words when hours have
    passed, and each again when its turn comes. Of a key that is given twice (`with_whole_values`) it keeps one.
    """
    compose: Any = ConfigLoaderImpl.load_sweep_config
    kept: dict[tuple[str, ...], DictConfig] = {}

    def load(self: Any, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        words = tuple(sweep_overrides)
        if words in kept:
            return kept.pop(words)
        kept[words] = compose(self, master_config, with_whole_values(sweep_overrides))
        return kept[words]

    ConfigLoaderImpl.load_sweep_config = load  # type: ignore[method-assign]  # a plugin must lie in a package of Hydra's
    try:
        yield
    finally:
        ConfigLoaderImpl.load_sweep_config = compose  # type: ignore[method-assign]
