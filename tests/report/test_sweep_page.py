"""The pages of sweeps and pipelines."""

import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest
from report.folders import Page, write_run

from rlhf.report.folder import runs_in
from rlhf.report.sweep import entries_of, frontier
from rlhf.report.write import kind_of, write_report


def write_swept(folder: Path, coef: str, kl: float, reward: float, **result) -> None:
    rows = [{"step": s, "kl/k3": kl * s, "reward/mean": reward * s, "loss": 1.0} for s in range(1, 9)]
    if not kl:
        rows = [{name: value for name, value in row.items() if name != "kl/k3"} for row in rows]
    write_run(folder, rows, ["algorithm=grpo", f"algorithm.kl.coef={coef}"], n_steps=8)
    result = {"status": "ok", "before/accuracy": 0.25, "after/accuracy": reward, "loss": 1.0, **result}
    (folder / "summary.json").write_text(json.dumps(result))


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Of five coefficients; the run with 0 has no divergence, the last one failed."""
    for place, (coef, kl) in enumerate([("0", 0), ("0.01", 0.4), ("0.05", 0.2), ("0.2", 0.1)]):
        write_swept(tmp_path / str(place), coef, kl, 0.5 + kl)
    folder = tmp_path / "10"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"status": "failed", "error": "ValueError: <b>no</b>"}))
    return tmp_path


def test_the_frontier_of_a_sweep(sweep):
    spots = frontier(entries_of(sweep))
    assert [spot.name for spot in spots] == ["kl.coef=0.01", "kl.coef=0.05", "kl.coef=0.2"]
    # the last quarter of eight steps: 7 and 8, mean 7.5
    assert [spot.x for spot in spots] == pytest.approx([3.0, 1.5, 0.75])
    assert [spot.y for spot in spots] == pytest.approx([7.5 * 0.9, 7.5 * 0.7, 7.5 * 0.6])
    path = write_report(sweep)
    drawn = xml.etree.ElementTree.parse(sweep / "reward_kl.svg").getroot()
    text = " ".join(node.text or "" for node in drawn.iter())
    for told in ("kl.coef=0.01", "kl.coef=0.05", "kl.coef=0.2", "kl/k3, nats per token", "reward/mean"):
        assert told in text, told
    page = Page(path)
    assert "reward_kl.svg" in page.values("href")
    assert "Without a divergence or a reward: kl.coef=0" in page.text


def test_the_table_of_a_sweep(sweep):
    (sweep / "2" / "report.html").write_text("")
    page = Page(write_report(sweep))
    assert "5 runs, 1 failed" in page.text
    assert "rlhf -m algorithm=grpo algorithm.kl.coef=0,0.01,0.05,0.2" in page.text
    table = re.search(r"Runs(.*)before → after", page.text).group(1)
    assert re.search(r"10\.01finished0\.25 → 0\.9.*20\.05finished0\.25 → 0\.7.*10–failed: ValueError: <b>no</b>", table)
    assert [target for target in page.values("href") if target.endswith(".html")] == ["2/report.html"]
    assert [path.name for path in runs_in(sweep)] == ["0", "1", "2", "3", "10"]


def test_curves_of_a_sweep_are_on_the_same_axes(sweep):
    page = Page(write_report(sweep))
    chart = re.search(r"<figcaption><b><a [^>]*>reward/mean</a>.*?</svg>", page.source).group(0)
    names = re.findall(r"<title>(kl\.coef=[\d.]+)</title>", chart)
    colours = re.findall(r'<g stroke="(#\w+)"', chart)
    assert names == ["kl.coef=0", "kl.coef=0.01", "kl.coef=0.05", "kl.coef=0.2"]
    assert len(set(colours)) == 4


def test_a_sweep_of_one_run_and_one_of_nothing_that_ended(tmp_path):
    write_run(tmp_path / "one" / "0", [{"step": 1, "loss": 1.0}], ["seed=1"], n_steps=4)
    page = Page(write_report(tmp_path / "one"))
    assert "1 run, 0 failed" in page.text
    assert "the log ends after step 1 of 4" in page.text
    assert not (tmp_path / "one" / "reward_kl.svg").exists()


def test_folders_with_strange_names_are_linked(tmp_path):
    run = write_run(tmp_path / "a=1,b='x' #%", [{"step": 1, "loss": 1.0}])
    (run / "report.html").write_text("")
    assert Page(write_report(tmp_path)).values("href") == ["a%3D1%2Cb%3D%27x%27%20%23%25/report.html"]


def test_the_stages_of_a_pipeline(tmp_path):
    (tmp_path / ".hydra").mkdir()
    config = (
        "pipeline:\n  stages:\n    sft: [algorithm=sft]\n    dpo: [algorithm=dpo]\n    late: [seed=1]\n  report: null\n"
    )
    (tmp_path / ".hydra" / "config.yaml").write_text(config)
    stages = {name: write_run(tmp_path / name, [{"step": 1, "loss": 1.0}], n_steps=4) for name in ("dpo", "sft")}
    result = {"before/nll": 7.5, "after/nll": 1.25, "before/accuracy": 0.0, "after/accuracy": 0.5}
    result |= {"after/accuracy_low": 0.4, "after/accuracy_high": 0.6}
    (stages["sft"] / "stage.json").write_text(json.dumps({"overrides": [], "result": result}))
    write_report(stages["sft"])
    assert kind_of(tmp_path) == "pipeline"
    page = Page(write_report(tmp_path))
    table = re.search(r"Stages(.*)Held-out metrics before", page.text).group(1)
    assert re.search(
        r"stagenllaccuracysftfinished7\.5 → 1\.250 → 0\.50\.4 to 0\.6dpothe log ends after step 1 of 4", table
    )
    assert "latenot begun––" in table
    assert "1 of 3 stages finished" in page.text
    assert "sft/report.html" in page.values("href")


def test_a_run_that_holds_an_evaluation_of_itself_is_a_run(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    write_run(run / "evaluation", [{"step": 1, "loss": 1.0}])
    assert kind_of(run) == "run"
    assert kind_of(tmp_path) == "sweep"
