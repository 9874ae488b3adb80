"""The update is compiled while the run looks at held-out rows, where that can be done."""

import jax
import jax.numpy as jnp
import pytest
from test_loop import Line, Rows, job, line, rows, trained

from rlhf.config import config
from rlhf.train import ahead, guard
from rlhf.train.ahead import compiled_meanwhile


@config
class Answering(Line):
    """It would write answers in `prepare`."""

    @property
    def needs_reward(self):
        return True


@pytest.fixture(autouse=True)
def nothing_is_known():
    ahead._known.clear()
    jax.clear_caches()


def updates(recording):
    return [one.is_ahead for one in recording.compilations if one.name == "eager_update"]


def test_the_update_is_there_when_the_first_look_ends(tmp_path):
    """Compiled once, in the background, and the run is the one without it, rows and memory."""
    look = {"held_out": Rows()[0], "eval_every": 3}
    with guard.record_compilations() as recording:
        trainer = trained(job(tmp_path / "ahead", **look, forbid_recompile=True))
    assert updates(recording) == [True]
    assert int(trainer.job.runtime.memory["n_prepared"]) == 10
    with guard.record_compilations() as recording:
        trained(job(tmp_path / "again", **look))
    assert updates(recording) == []
    trained(job(tmp_path / "eager", **look, eager=True))
    numbers = [[row.get("loss") for row in rows(tmp_path / name)] for name in ("ahead", "again")]
    assert numbers[0] == numbers[1]
    assert rows(tmp_path / "eager")[-1]["loss"] == pytest.approx(numbers[0][-1], rel=1e-5)


@pytest.mark.parametrize("case", ["no look", "answers first", "another platform"])
def test_elsewhere_it_is_compiled_at_the_first_step(tmp_path, monkeypatch, case):
    look = {} if case == "no look" else {"held_out": Rows()[0]}
    if case == "another platform":
        monkeypatch.setattr(ahead.jax, "default_backend", lambda: "gpu")
    algorithm = Answering(batch_size=8, microbatch_size=4, learning_rate=0.1) if case == "answers first" else line()
    with guard.record_compilations() as recording:
        trained(job(tmp_path, algorithm, **look))
    assert updates(recording) == [False]


def test_an_error_of_the_compiler_is_left_to_the_first_call():
    def wrong(x):
        raise ValueError("no such shape")

    function = jax.jit(wrong)
    with compiled_meanwhile(function, jnp.ones(3)):
        pass
    with pytest.raises(ValueError, match="no such shape"):
        function(jnp.ones(3))


def test_an_error_of_the_block_is_told_when_the_compiler_has_ended():
    function = jax.jit(lambda x: x + 1)
    with guard.record_compilations() as recording, pytest.raises(KeyError), compiled_meanwhile(function, jnp.ones(3)):
        raise KeyError("look")
    assert any(one.is_ahead for one in recording.compilations)
