"""Compiling the programs of a shape side by side, before its first prompt, and saying what that took."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from rlhf.model.gemma3 import Tree
from rlhf.sampling import programs
from rlhf.sampling.cache import Pictures
from rlhf.sampling.programs import Setting
from rlhf.sampling.rules import Rules
from rlhf.sampling.schedule import prefill_chunk, stage_size
from rlhf.sampling.shapes import Shape
from rlhf.sampling.side_by_side import Parts

log = logging.getLogger(__name__)

IN_BACKGROUND = "rlhf-compiles-ahead"  # in the names of threads that compile what nobody waits for yet

_known: dict[Any, Future] = {}  # the seconds that each took
_lock = threading.Lock()


def compile_ahead(
    setting: Setting, parts: Parts, weights: Tree, rules: Rules, key: Key[Array, ""], n_images: int = 0
) -> float:
    """Compile what schedules of this shape need, unless it is there already; the seconds it took, or 0.

    Where another thread is compiling it, this one waits. n_images: of a prompt; with some, the programs of such prompts
    are compiled too.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return 0.0
    seconds = compile_ahead(setting, parts, weights, rules, key) if n_images else 0.0
    mine: Future = Future()
    with _lock:
        name = (setting, parts.shape, n_images, _identity(weights))
        known = _known.setdefault(name, mine)
    if known is not mine:
        known.result()
        return seconds
    try:
        lowerings = _lowerings(setting, parts.shape, weights, rules, key, n_images)
        mine.set_result(_compile(setting, parts, lowerings, n_images))
    except BaseException as error:  # whoever waits gets it too; the next call tries again
        mine.set_exception(error)
        _known.pop(name)
        raise
    return seconds + mine.result()


def compile_in_background(work: Sequence[Callable[[], float]]) -> None:
    """Do these one after the other in a thread that does not keep the process from ending."""

    def run():
        for compile_one in work:
            compile_one()

    threading.Thread(target=run, name=IN_BACKGROUND, daemon=True).start()


def _identity(weights: Tree) -> Any:
    leaves, structure = jax.tree.flatten(weights)
    return structure, tuple((x.shape, str(x.dtype), x.sharding) for x in leaves)


def compile_together(lowerings: Sequence[Callable[[], Any]]) -> float:
    """Compile what each gives, side by side; the seconds it took."""
    started, prefix = time.perf_counter(), threading.current_thread().name
    with ThreadPoolExecutor(len(lowerings), thread_name_prefix=prefix) as pool:
        list(pool.map(lambda lower: lower().compile(), lowerings))
    return time.perf_counter() - started


def _compile(setting: Setting, parts: Parts, lowerings: list[Callable[[], Any]], n_images: int) -> float:
    seconds = compile_together(lowerings)
    what = f"{parts}, prompts with {n_images} images" if n_images else str(parts)
    size = parts.n * kept_bytes(setting, parts.shape) / 1e6
    log.info("generation for %s: compiled in %.1f s, %.1f MB of keys and values", what, seconds, size)
    return seconds


def kept_bytes(setting: Setting, shape: Shape) -> int:
    """Memory of the keys and values of a shape, over all devices."""
    prompts, answers = jax.eval_shape(programs.empty, setting, shape)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((prompts.cache, answers.cache)))


def _lowerings(
    setting: Setting, shape: Shape, weights: Tree, rules: Rules, key: Key[Array, ""], n_images: int
) -> list[Callable[[], Any]]:
    """What gives each program of the shape, not compiled yet; with images, those of prompts that have some."""
    number, size = np.int32(0), stage_size(shape, n_images > 0)
    prompts, answers = programs.empty(setting, shape)
    rows = programs.idle_rows(shape.rows)
    tokens, lengths = np.zeros((size, shape.prompt_tokens), np.int32), np.ones(size, np.int32)
    stage = programs.empty_stage(setting, size, shape.prompt_tokens)
    seats = programs.Seats(number, np.zeros(size, np.int32), np.zeros(size, np.int32))
    chunk, pictures = prefill_chunk(shape.prompt_tokens), None
    if n_images:
        chunk, pictures = shape.prompt_tokens, _black(setting, tokens, n_images)
    found: list[Callable[[], Any]] = [
        lambda: programs.prefill.lower(setting, weights, stage, tokens, (number, number), chunk, pictures),
        lambda: programs.seat.lower(setting, prompts, stage, tokens, lengths, seats),
    ]
    if not n_images:  # the longest first
        until = (number, number)
        found.insert(0, lambda: programs.decode.lower(setting, weights, prompts, answers, rows, rules, key, until))
    return found


def _black(setting: Setting, tokens: np.ndarray, n_images: int) -> Pictures:
    size = setting.model.architecture.tower.image_size
    images = np.zeros((len(tokens), n_images, size, size, 3), np.uint8)
    return Pictures(jnp.zeros(tokens.shape, jnp.int32), jnp.asarray(images))
