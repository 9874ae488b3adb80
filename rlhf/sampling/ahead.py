"""Compiling the programs of a shape side by side, before its first prompt, and saying what that took."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from rlhf.model.gemma3 import Tree
from rlhf.sampling import programs
from rlhf.sampling.programs import Setting, Shape
from rlhf.sampling.rules import Rules
from rlhf.sampling.schedule import prefill_chunk, stage_size

log = logging.getLogger(__name__)

_known: set[Any] = set()


def compile_ahead(setting: Setting, shape: Shape, weights: Tree, rules: Rules, key: Key[Array, ""]) -> float:
    """Compile what the shape needs, unless it is there already; the seconds it took.

    The programs of prompts with images are left to their first use: their size depends on the number of images.
    """
    leaves, structure = jax.tree.flatten(weights)
    name = (setting, shape, structure, tuple((x.shape, str(x.dtype), x.sharding) for x in leaves))
    if name in _known or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return 0.0
    _known.add(name)
    started = time.perf_counter()
    chunk = prefill_chunk(shape.prompt_tokens)
    size = stage_size(shape, has_images=False)
    tokens, number = np.zeros((size, shape.prompt_tokens), np.int32), np.int32(0)
    prompts, answers = programs.empty(setting, shape)
    stage = programs.empty_stage(setting, size, shape.prompt_tokens)
    seats = programs.Seats(number, np.zeros(size, np.int32), np.zeros(size, np.int32))
    rows = programs.idle_rows(shape.rows)
    lowered = [
        lambda: programs.decode.lower(setting, weights, prompts, answers, rows, rules, key, (number, number)),
        lambda: programs.prefill.lower(setting, weights, stage, tokens, (number, number), chunk, None),
        lambda: programs.seat.lower(setting, prompts, stage, tokens, np.ones(size, np.int32), seats),
    ]
    with ThreadPoolExecutor(len(lowered)) as pool:
        list(pool.map(lambda lower: lower().compile(), lowered))
    seconds = time.perf_counter() - started
    log.info("generation for %s: compiled in %.1f s", shape, seconds)
    return seconds
