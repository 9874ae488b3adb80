"""Compilations are counted by function, and a second trace says why it happened."""

import logging

import jax
import jax.numpy as jnp
import pytest

from rlhf.errors import TrainingError
from rlhf.train import guard


def test_compilations_are_counted_by_function():
    def doubled(x):
        return x * 2

    one, two = jnp.zeros(3), jnp.zeros(4)
    function = jax.jit(doubled)
    before = guard.compilations()
    with guard.record_compilations() as recording:
        function(one)
        function(two)
        function(one)
    function(jnp.zeros(5))
    assert recording.names == {"doubled": 2}
    assert guard.compilations() >= before + 3
    assert str(recording).startswith("2 compilations (0 from the cache on disk) in ")
    assert str(recording).endswith(" s: doubled × 2")
    assert 0 < recording.seconds < 60


def test_a_program_from_the_cache_on_disk_is_marked(tmp_path):
    def from_disk(x):
        return jnp.sin(x) * 12.5

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
            jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
        x = jnp.zeros(3)
        with guard.record_compilations() as recording:
            jax.jit(from_disk)(x)
            jax.clear_caches()
            jax.jit(from_disk)(x)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
    assert [(one.name, one.is_from_disk) for one in recording.compilations] == [
        ("from_disk", False),
        ("from_disk", True),
    ]


def test_forbidden_compilations_are_named():
    def late(x):
        return x + 1

    x = jnp.zeros(3)
    with guard.forbid_compilations("the second run"):
        pass
    with (
        pytest.raises(
            TrainingError, match=r"the second run must compile nothing new, but there were 1 compilations .*: late"
        ),
        guard.forbid_compilations("the second run"),
    ):
        jax.jit(late)(x)


def test_traces_are_counted_with_the_reason(caplog):
    def step(settings, batch):
        return batch["tokens"] * settings["beta"]

    counter = guard.TraceCounter(step, "the step")
    function = jax.jit(counter)
    tokens = jnp.ones((2, 8))
    with caplog.at_level(logging.INFO):
        function({"beta": jnp.float32(0.1)}, {"tokens": tokens})
        function({"beta": jnp.float32(0.5)}, {"tokens": tokens})
        assert (counter.n_traces, caplog.messages) == (1, [])
        function({"beta": 0.5}, {"tokens": tokens})
        function({"beta": 0.5}, {"tokens": jnp.ones((4, 8))})
    assert counter.n_traces == 3
    assert caplog.messages == [
        "compiling the step once more (2 times in this process): settings['beta']: float32[] → float32[] (weak type)",
        "compiling the step once more (3 times in this process): batch['tokens']: float32[2, 8] → float32[4, 8]",
    ]


def test_a_run_without_compilation_is_no_trace():
    counter = guard.TraceCounter(lambda x: x + 1, "the sum")
    assert counter(jnp.zeros(())) == 1
    with jax.disable_jit():
        jax.jit(counter)(jnp.zeros(()))
    assert counter.n_traces == 0
