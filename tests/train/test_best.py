"""The best parameters by a held-out metric: kept when it is better, through a resume, and found again."""

import logging

import jax.numpy as jnp
import pytest

from rlhf.errors import TrainingError
from rlhf.train.best import Best
from rlhf.train.checkpoint import Checkpoints, is_run, read_record, run_folder

RECORD = {"config": {}, "seed": 0}


MEASURED = {"trainer.eval_rows": 8, "evaluation": {"rows": None, "stop": ("a",)}}


def offered(
    folder, values: dict[int, float], better="higher", start: int = 0, metric="val/accuracy", measured=MEASURED
) -> Checkpoints:
    best = Best(folder, metric, better, start, measured)
    for step, value in values.items():
        best.offer(step, {metric: value, "loss": 1.0}, {"model": {"x": jnp.full(3, float(step))}}, RECORD)
    return Checkpoints(folder / "best", 1)


def kept(checkpoints: Checkpoints) -> tuple[int, float]:
    (step,) = checkpoints.steps()
    target = {"params": {"model": {"x": jnp.zeros(3)}}}
    tree, record = checkpoints.restore(target, allow_older=False)
    assert tree["params"]["model"]["x"].tolist() == [step] * 3
    return step, record["best"]["value"]


def test_the_highest_is_kept_and_the_first_of_equals(tmp_path):
    found = offered(tmp_path, {0: 0.1, 2: 0.5, 4: 0.5, 6: 0.3})
    assert kept(found) == (2, 0.5)
    of = {"trainer.best_metric": "val/accuracy", "trainer.best_is": "higher", "trainer.eval_rows": 8}
    of["evaluation"] = {"rows": None, "stop": ["a"]}
    assert read_record(tmp_path / "best")["best"] == {"metric": "val/accuracy", "value": 0.5, "of": of}


def test_the_lowest_where_that_is_better(tmp_path):
    assert kept(offered(tmp_path, {0: 2.0, 2: 0.5, 4: 0.7}, better="lower")) == (2, 0.5)


def test_a_resumed_run_knows_it(tmp_path):
    offered(tmp_path, {0: 0.1, 2: 0.5})
    assert kept(offered(tmp_path, {4: 0.4}, start=3)) == (2, 0.5)
    assert kept(offered(tmp_path, {6: 0.6}, start=4)) == (6, 0.6)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"metric": "val/loss", "better": "lower"}, "trainer.best_is and trainer.best_metric"),
        ({"better": "lower"}, "trainer.best_is"),
        ({"measured": {**MEASURED, "trainer.eval_rows": 4}}, "trainer.eval_rows"),
        ({"measured": {**MEASURED, "evaluation": {"rows": 3}}}, "evaluation"),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(tmp_path, caplog, changed, told):
    offered(tmp_path, {2: 0.5})
    value = 0.9 if changed.get("better") == "lower" else 0.4  # worse than the value that was kept
    with caplog.at_level(logging.WARNING):
        assert kept(offered(tmp_path, {4: value}, start=3, **changed)) == (4, value)
    message = f"the best so far was of val/accuracy (0.5 at step 2) and kept with another {told}: looking for the best "
    assert f"{message}{changed.get('metric', 'val/accuracy')} anew" in caplog.text


@pytest.mark.parametrize(("stored", "found"), [("val/accuracy", (2, 0.5)), ("val/loss", (4, 0.4)), (None, (4, 0.4))])
def test_an_older_record_tells_its_metric_alone(tmp_path, stored, found):
    best = {"value": 0.5} if stored is None else {"metric": stored, "value": 0.5}
    params = {"model": {"x": jnp.full(3, 2.0)}}
    Checkpoints(tmp_path / "best", 1).save(2, {"params": params}, {**RECORD, "best": best})
    assert kept(offered(tmp_path, {4: 0.4}, start=3)) == found


def test_what_was_kept_after_the_step_that_a_run_goes_on_from_is_done_again(tmp_path):
    offered(tmp_path, {0: 0.1, 4: 0.5})
    assert kept(offered(tmp_path, {4: 0.2}, start=2)) == (4, 0.2)


def test_its_folder_is_a_checkpoint_of_the_run(tmp_path):
    offered(tmp_path, {2: 0.5})
    assert is_run(tmp_path / "best")
    assert run_folder(tmp_path / "best") == run_folder(tmp_path / "best" / "step_2") == tmp_path


def test_a_metric_that_is_not_measured_is_named(tmp_path):
    message = r"trainer.best_metric=val/reward is not measured by this run; held out there are: val/accuracy, val/loss"
    best = Best(tmp_path, "val/reward", "higher", 0)
    with pytest.raises(TrainingError, match=message):
        best.offer(0, {"val/accuracy": 0.0, "val/loss": 1.0, "loss": 2.0}, {}, RECORD)


def test_without_a_metric_nothing_is_kept(tmp_path):
    Best(tmp_path, None, "higher", 0).offer(0, {}, {}, RECORD)
    assert not (tmp_path / "best").exists()
