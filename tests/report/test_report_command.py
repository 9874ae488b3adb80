"""Reports as commands leave them."""

import re

from report.folders import Page

from rlhf.report import write


def test_runs_and_sweeps_leave_reports(command, small, tmp_path, monkeypatch):
    words = [*small, "algorithm=dpo", "evaluation.rows=0", "trainer.max_steps=2"]
    done = command("-m", *words, "algorithm.beta=0.1,0.5", "hydra.sweep.dir=sweep")
    assert done.code == 0, done.output
    path = tmp_path / "sweep" / "report.html"
    assert f"curves side by side: {path}" in done.output
    sweep = Page(path)
    assert [target for target in sweep.values("href") if "/" in target] == ["0/report.html", "1/report.html"]
    assert "algorithm.beta=0.1,0.5" in sweep.text
    run = tmp_path / "sweep" / "1" / "report.html"
    page = Page(run)
    assert "finished: 2 steps" in page.text
    assert "algorithm.beta=0.5" in page.text
    assert re.search(r"Written by: jax [\d.]+", page.text)
    assert "rewards/margins" in page.text

    path.unlink()
    first = run.read_bytes()
    run.unlink()
    for folder, told in (("sweep", "sweep/report.html"), ("sweep/1", "sweep/1/report.html")):
        again = command("task=report", f"run={folder}")
        assert again.code == 0, again.output
        assert f"written: {told}" in again.output
    assert run.read_bytes() == first
    assert Page(path).text == sweep.text

    refused = command("task=report", "run=sweep/1/checkpoints")
    assert refused.code == 1
    assert "holds no run, sweep or pipeline" in refused.output
    missing = command("task=report", "run=nowhere")
    assert "run=nowhere is no folder" in missing.output

    def broken(folder):
        raise ZeroDivisionError("bad luck")

    monkeypatch.setattr(write, "run_page", broken)
    alone = command(*words, "hydra.run.dir=alone")
    assert alone.code == 0, alone.output
    (line,) = [line for line in alone.output.splitlines() if "was not written" in line]
    assert line.endswith("alone/report.html was not written: ZeroDivisionError: bad luck")
