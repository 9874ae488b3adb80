"""Rows and events of a run: exact numbers, and after a resume the same rows as without the interruption."""

import json
import logging
import math
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.errors import CheckpointError
from rlhf.train.metrics import MetricsWriter, Progress, SamplesWriter, format_held_out, format_metrics, read_metrics


def loss(step: int) -> float:
    return float(np.float32(1 / (step + 3)))


def train(folder, first: int, last: int, resume_step: int | None = None) -> None:
    with MetricsWriter(folder, resume_step) as writer:
        for step in range(first, last + 1):
            writer.write(step, {"loss": loss(step), "val/loss": 2.0 * step}, {"seconds": 0.5})


def lines(folder, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().split("\n")[:-1]]


def events(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(one.step, one.value) for one in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_a_row_is_step_metrics_times_with_exact_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.float32(0.1), "n_tokens": np.int64(7), "rate": 1e-6}, {"seconds": 1 / 3})
    text = (tmp_path / "metrics.jsonl").read_bytes()
    assert (
        text
        == b'{"step": 1, "loss": 0.10000000149011612, "n_tokens": 7, "rate": 1e-06, "seconds": 0.3333333333333333}\n'
    )
    (row,) = read_metrics(tmp_path)
    assert np.float32(row["loss"]) == np.float32(0.1)
    assert row["seconds"] == 1 / 3


def test_nan_and_infinities_are_strings_in_the_file_and_numbers_when_read(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": jnp.float32(-jnp.inf)}, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}\n'
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)
    assert math.isnan(events(tmp_path)["a"][0][1])


@pytest.mark.parametrize("resume_step", [1, 3, 4, 6])
def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path, resume_step):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    train(tmp_path / "whole", 1, 9)
    train(tmp_path / "killed", 1, 6)
    train(tmp_path / "killed", resume_step + 1, 9, resume_step)
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed"))
    assert killed == whole
    assert events(tmp_path / "killed") == events(tmp_path / "whole")
    assert events(tmp_path / "whole")["loss"] == [(step, loss(step)) for step in range(1, 10)]


def test_a_resume_of_a_resume_and_a_fresh_start(tmp_path):
    train(tmp_path, 1, 5)
    train(tmp_path, 4, 8, 3)
    train(tmp_path, 6, 7, 5)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in events(tmp_path)["loss"]] == [1, 2, 3, 4, 5, 6, 7]
    train(tmp_path, 0, 1)
    assert [row["step"] for row in lines(tmp_path)] == [0, 1], "without a step to resume from nothing is kept"
    assert [step for step, _ in events(tmp_path)["loss"]] == [0, 1]


def test_a_line_cut_by_a_kill_goes_and_a_whole_one_without_its_end_stays(tmp_path):
    train(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 4, "loss": 0.1')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    MetricsWriter(tmp_path, 3).close()
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    MetricsWriter(tmp_path, 3).close()
    assert path.read_bytes() == whole
    path.write_bytes(whole + b"\0" * 500)
    MetricsWriter(tmp_path, 3).close()
    assert path.read_bytes() == whole


def test_an_event_file_cut_by_a_kill_does_not_hide_what_follows(tmp_path):
    train(tmp_path, 1, 5)
    (path,) = tmp_path.glob("events.out.tfevents.*")
    path.write_bytes(path.read_bytes()[:-7])
    train(tmp_path, 5, 6, 4)
    assert events(tmp_path)["loss"] == [(step, loss(step)) for step in range(1, 7)]


@pytest.mark.parametrize("line", [b"not json", b"[1]", b'{"loss": 1}', b'{"step": "3"}'])
def test_a_line_that_is_no_row_is_refused(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2 is not a JSON row with a whole-number step: b'"):
        MetricsWriter(tmp_path, 2)


def test_a_lost_file_is_told(tmp_path, caplog):
    MetricsWriter(tmp_path, 5).close()
    assert re.search(r"metrics\.jsonl is gone: its rows up to step 5 are lost", caplog.text)


def test_rows_that_would_double_are_refused(tmp_path):
    with MetricsWriter(tmp_path, 3) as writer:
        writer.write(4, {"loss": 1}, {})
        for step in (4, 2):
            with pytest.raises(
                ValueError, match=f"metrics of step {step} after those of step 4: a row would be doubled"
            ):
                writer.write(step, {"loss": 1}, {})
        with pytest.raises(ValueError, match="two columns of metrics are called 'seconds'"):
            writer.write(5, {"seconds": 1}, {"seconds": 2})


def test_flushed_rows_are_in_both_files_while_the_writer_lives(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.5}, {})
    assert [row["step"] for row in lines(tmp_path)] == [1], "a kill loses no row"
    assert not list(tmp_path.glob("events*")), "tensorboardX is not imported on the way to the first step"
    writer.flush()
    assert events(tmp_path) == {"loss": [(1, 1.5)]}
    for step in range(2, 19):
        writer.write(step, {"loss": 1.5}, {})
    assert len(events(tmp_path)["loss"]) == 17, "a long run shows its curves without a checkpoint"
    writer.close()
    assert len(events(tmp_path)["loss"]) == 18


def test_samples_follow_the_same_rule(tmp_path):
    text = "line\nbreak \u2028 \ud800 ü 雪 <end_of_turn>"
    with SamplesWriter(tmp_path) as writer:
        for step in (0, 2, 4):
            writer.write(step, [{"prompt": text, "reward": np.float32(0.5)}, {"prompt": "b", "reward": math.nan}])
        writer.flush()
    whole = (tmp_path / "samples.jsonl").read_bytes()
    with SamplesWriter(tmp_path, 2) as writer:
        assert [row["step"] for row in lines(tmp_path, "samples.jsonl")] == [0, 0, 2, 2]
        writer.write(4, [{"prompt": text, "reward": np.float32(0.5)}, {"prompt": "b", "reward": math.nan}])
    assert (tmp_path / "samples.jsonl").read_bytes() == whole
    assert lines(tmp_path, "samples.jsonl")[0] == {"step": 0, "prompt": text, "reward": 0.5}
    assert lines(tmp_path, "samples.jsonl")[1]["reward"] == "NaN"


def test_log_lines_stand_below_each_other():
    first = format_metrics(
        5, 100, {"loss": 0.693147, "learning_rate": 1e-6, "n_skipped": 0}, {"tokens_per_second": 1234.5}
    )
    second = format_metrics(
        100, 100, {"loss": -12345.678, "learning_rate": 0.0, "n_skipped": 3}, {"tokens_per_second": 99}
    )
    assert first == "step   5/100  loss 0.6931      learning_rate 1e-06          1,234 tokens/s"
    assert second == "step 100/100  loss -1.235e+04  learning_rate 0           n_skipped 3                 99 tokens/s"


def test_held_out_numbers_have_a_line_with_intervals():
    metrics = {"loss": 1.0, "val/loss": 0.25, "val/n": 200, "val/accuracy": 0.5}
    metrics |= {"val/accuracy_low": 0.43, "val/accuracy_high": 0.57}
    assert format_held_out(metrics) == "held out: loss 0.25, n 200, accuracy 0.5 (0.43 to 0.57)"
    assert format_held_out({"loss": 1.0}) == ""


def test_progress_is_log_lines_when_nobody_watches(caplog, capfd, monkeypatch):
    clock = iter([100.0, 102.0, 106.0])
    monkeypatch.setattr("rlhf.train.metrics.time.monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO), Progress(10, 4) as progress:
        for step in (5, 6, 8):
            progress.update(step, {"loss": 0.5}, {"tokens_per_second": 10.0})
    ends = [record.message.split("tokens/s")[1].strip() for record in caplog.records]
    assert ends == ["", "0:00:08 left", "0:00:04 left"], "the step with the compilation is not counted"
    assert capfd.readouterr() == ("", "")


def test_progress_is_a_bar_on_a_terminal(caplog, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with caplog.at_level(logging.INFO), Progress(10, 4) as progress:
        progress.update(5, {"loss": 0.5}, {"tokens_per_second": 1000.0})
        progress.update(6, {"loss": 0.25}, {"tokens_per_second": 1000.0})
    shown = capsys.readouterr().err
    assert " 60% |" in shown
    assert re.search(r"6/10, loss 0\.25, 1,000 tokens/s, \d:\d\d:\d\d left", shown)
    assert len(caplog.records) == 2, "the log has the lines too"
