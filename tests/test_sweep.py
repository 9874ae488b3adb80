"""A sweep in one process: a folder for each run, one table, one set of compilations, weights and data loaded once."""

import collections
import csv
import json
import os
import signal

import jax
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from rlhf import build
from rlhf.data.arithmetic import Arithmetic
from rlhf.train import guard, loop, sources

TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(build, "_kept", {})


@pytest.fixture
def base(command, small, tmp_path):
    """The folder of a run whose parameters the sweeps start from."""
    done = command(*small, "algorithm.learning_rate=1e-2", "evaluation.rows=0", "hydra.run.dir=base")
    assert done.code == 0, done.output
    return tmp_path / "base"


@pytest.fixture
def words(small, base):
    return [*small, "algorithm=dpo", f"model.checkpoint={base}", "evaluation.rows=0", "trainer.max_steps=3"]


def metrics(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def table(folder) -> list[dict]:
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def counted(monkeypatch):
    """What was loaded and compiled before and in each run: {"loads": [...], "compiled": [...]}."""
    counts = {"loads": [], "compiled": []}
    load_parameters, load, run = sources.load_parameters, Arithmetic.load, build.Experiment.training_job

    def counting_parameters(*arguments, **settings):
        counts["loads"].append("parameters")
        return load_parameters(*arguments, **settings)

    def counting_rows(self, part, form, *others):
        counts["loads"].append(f"{part} {form}")
        return load(self, part, form, *others)

    def marked(self):
        counts["compiled"].append(guard.compilations())
        return run(self)

    monkeypatch.setattr(sources, "load_parameters", counting_parameters)
    monkeypatch.setattr(Arithmetic, "load", counting_rows)
    monkeypatch.setattr(build.Experiment, "training_job", marked)
    return counts


def test_a_grid_of_betas_and_learning_rates(command, words, counted, tmp_path):
    grid = ["algorithm.beta=0.05,0.1,0.5", "algorithm.learning_rate=1e-6,1e-4"]
    jax.clear_caches()  # other tests may have compiled the same programs
    with guard.record_compilations() as all_runs:
        done = command("-m", *words, *grid, "hydra.sweep.dir=sweep")
    assert done.code == 0, done.output
    rows = table(tmp_path / "sweep")
    assert [row["run"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert [(float(row["algorithm.beta"]), float(row["algorithm.learning_rate"])) for row in rows] == [
        (beta, rate) for beta in (0.05, 0.1, 0.5) for rate in (1e-6, 1e-4)
    ]
    for row in rows:
        folder = tmp_path / "sweep" / row["run"]
        last = metrics(folder)[-1]
        assert row["status"] == "ok"
        assert float(row["after/rewards/margins"]) == last["val/rewards/margins"]
        assert float(row["loss"]) == last["loss"]
        assert {".hydra", "config.json", "log.txt", "checkpoints"} <= {path.name for path in folder.iterdir()}
    assert len({row["after/rewards/margins"] for row in rows}) == 6
    shown = done.output.partition("\n6 runs, 0 failed")[0].rstrip().rpartition("\n\n")[2]
    assert "algorithm.beta" in shown
    assert "trainer.max_steps" not in shown  # equal in all runs
    assert f"6 runs, 0 failed; table: {tmp_path / 'sweep' / 'summary.csv'}" in done.output

    assert sorted(counted["loads"]) == ["eval preference", "parameters", "train preference"]
    second, end = counted["compiled"][1], guard.compilations()
    later = all_runs.compilations[len(all_runs.compilations) - (end - second) :]
    assert not later, f"runs after the first compiled {[one.name for one in later]}"
    assert sum(n for name, n in all_runs.names.items() if "update" in name) == 1, all_runs.names


def numbers(tree, prefix: str = "algorithm") -> dict[str, float]:
    """The floats of an algorithm's yaml by their full names."""
    if isinstance(tree, dict):
        return {k: v for name, node in tree.items() for k, v in numbers(node, f"{prefix}.{name}").items()}
    return {prefix: tree} if isinstance(tree, float) else {}


@pytest.mark.parametrize("algorithm", ["sft", "tr_dpo", "kto"])
def test_no_number_of_an_algorithm_compiles_again(command, small, tmp_path, algorithm):
    off = ["trainer.eval_rows=0", "evaluation.rows=0"]
    words = [*small, *off, f"algorithm={algorithm}"]
    first = command(*words, "hydra.run.dir=first")
    assert first.code == 0, first.output
    chosen = json.loads((tmp_path / "first" / "config.json").read_text())["algorithm"]
    changed = {name: value * 0.9 if value else 0.05 for name, value in numbers(chosen).items()}
    assert {"algorithm.learning_rate", "algorithm.clip_norm", "algorithm.optimizer.b1"} <= changed.keys()
    with guard.record_compilations() as again:
        second = command(*words, *(f"{name}={value}" for name, value in changed.items()), "hydra.run.dir=second")
    assert second.code == 0, second.output
    assert len(again) == 0, str(again)
    assert metrics(tmp_path / "second") != metrics(tmp_path / "first")


def counting(function, counts: collections.Counter):
    """The function, which counts its calls under its name."""

    def counted(*arguments, **settings):
        counts[function.__name__] += 1
        return function(*arguments, **settings)

    return counted


def test_a_swept_run_equals_the_same_run_alone(command, words, tmp_path, monkeypatch):
    counts = collections.Counter()
    for module, name in ((build, "evaluate_prompts"), (loop, "measure_all")):
        monkeypatch.setattr(module, name, counting(getattr(module, name), counts))
    words = [*words, "trainer.checkpoint_every=2", "trainer.samples_every=2"]
    words += ["evaluation.rows=2", "evaluation.max_new_tokens=4"]
    # -m stands anywhere
    assert command(*words, "-m", "algorithm.learning_rate=1e-3,1e-4", "hydra.sweep.dir=sweep").code == 0
    assert counts == {"evaluate_prompts": 3, "measure_all": 3}  # what both begin with once, what each of them ends with
    assert command(*words, "algorithm.learning_rate=1e-4", "hydra.run.dir=alone").code == 0
    swept = tmp_path / "sweep" / "1"
    assert metrics(swept) == metrics(tmp_path / "alone")
    arrays = "checkpoints/step_3/arrays"
    files = [path.relative_to(swept) for path in (swept / arrays).rglob("*") if path.is_file()]
    assert len(files) > 40
    for file in files:
        assert (swept / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file


def test_a_failing_run_does_not_stop_the_others(command, words, tmp_path, monkeypatch):
    compose, composed = ConfigLoaderImpl.load_sweep_config, []

    def counting(self, master, overrides):
        composed.append(overrides)
        return compose(self, master, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counting)
    other = "algorithm.optimizer={_target_: rlhf.ops.optimizers.RMSProp, decay: 0.8}"  # none of AdamW's keys is left
    done = command("-m", *words, other, "algorithm.learning_rate=1e-5,-1,1e-4", "hydra.sweep.dir=sweep")
    assert done.code == 1
    assert len(composed) == 3  # each job once
    rows = table(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    reason = "algorithm.learning_rate=-1 of DPO must be at least 0"
    assert reason in rows[1]["error"]
    assert reason in (tmp_path / "sweep" / "1" / "log.txt").read_text()
    assert reason not in (tmp_path / "sweep" / "2" / "log.txt").read_text()
    assert "3 runs, 1 failed" in done.output
    assert "Traceback" not in done.output
    assert metrics(tmp_path / "sweep" / "2")[-1]["step"] == 3


def test_the_traceback_of_a_bug_is_in_the_log_of_its_run(command, words, tmp_path, monkeypatch):
    from rlhf.algorithms.dpo import DPO

    loss = DPO.prepare

    def broken(self, *arguments):
        if self.beta == 0.3:
            raise ZeroDivisionError("beta is unlucky")
        return loss(self, *arguments)

    monkeypatch.setattr(DPO, "prepare", broken)
    done = command("-m", *words, "algorithm.beta=0.3,0.1", "hydra.sweep.dir=sweep")
    assert done.code == 1
    text = (tmp_path / "sweep" / "0" / "log.txt").read_text()
    assert "Traceback" in text
    assert "ZeroDivisionError: beta is unlucky" in text
    assert table(tmp_path / "sweep")[0]["error"] == "ZeroDivisionError: beta is unlucky"
    assert "Traceback" not in (tmp_path / "sweep" / "1" / "log.txt").read_text()


def test_a_misspelt_key_ends_a_sweep_before_its_first_run(command, words, tmp_path):
    done = command("-m", *words, "algorithm.betta=0.1,0.5", "hydra.sweep.dir=sweep")
    assert done.code == 1
    assert "algorithm.betta: unknown key; did you mean algorithm.beta?" in done.output
    assert not list((tmp_path / "sweep").glob("*/metrics.jsonl"))


def test_fixed_settings_of_swept_groups_in_folders_of_folders(command, small, tmp_path):
    """What only the swept algorithms have may be fixed; a second command in the same folders changes nothing there."""
    where = ["hydra.sweep.dir=sweep", "hydra.sweep.subdir='runs/${hydra.job.num}'"]
    fixed = [*small, "evaluation.rows=0", "trainer.max_steps=1", *where]
    done = command("-m", *fixed, "algorithm=dpo,simpo", "algorithm.beta=0.2")
    assert done.code == 0, done.output
    assert "2 runs, 0 failed" in done.output
    found = {row["run"]: (row["algorithm"], row["algorithm.beta"]) for row in table(tmp_path / "sweep")}
    assert found == {"runs/0": ("dpo", "0.2"), "runs/1": ("simpo", "0.2")}
    files = {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    refused = command("-m", *fixed, "algorithm=dpo,simpo", "algorithm.beta=0.3")
    assert refused.code == 1
    assert "holds a run; resume=auto goes on with it" in refused.output
    changed = {path.name for path, content in files.items() if path.read_bytes() != content}
    assert changed <= {"multirun.yaml"}
    other = command(*small, "algorithm=dpo", "algorithm.beta=0.3", "hydra.run.dir=sweep/runs/0", "resume=auto")
    assert "algorithm.beta: 0.2 in the run, 0.3 now" in other.output
    changed = {path.name for path, content in files.items() if path.read_bytes() != content}
    assert changed <= {"multirun.yaml"}


def test_a_stopped_sweep_goes_on(command, words, tmp_path, monkeypatch):
    from rlhf.algorithms.dpo import DPO

    prepare, runs = DPO.prepare, []

    def stops(self, runtime, *arguments):
        if not any(runtime is one for one in runs):
            runs.append(runtime)
            if len(runs) == 2:  # before its first step, which it does before it leaves
                os.kill(os.getpid(), signal.SIGTERM)
        return prepare(self, runtime, *arguments)

    sweep = ["-m", *words, "algorithm.beta=0.1,0.3,0.5", "hydra.sweep.dir=sweep"]
    with monkeypatch.context() as patch:
        patch.setattr(DPO, "prepare", stops)
        stopped = command(*sweep)
    assert stopped.code == 143
    assert f"checkpoint written; go on with resume={tmp_path / 'sweep' / '1'}" in stopped.output
    assert [row["run"] for row in table(tmp_path / "sweep")] == ["0"]
    assert not (tmp_path / "sweep" / "2").exists()
    done = command(*sweep, "resume=auto")
    assert done.code == 0, done.output
    assert command(*sweep[:-1], "hydra.sweep.dir=whole").code == 0
    for number in "012":
        assert metrics(tmp_path / "sweep" / number) == metrics(tmp_path / "whole" / number)
    assert "going on after step 1" in (tmp_path / "sweep" / "1" / "log.txt").read_text()
    found, expected = table(tmp_path / "sweep"), table(tmp_path / "whole")
    for row in found:
        assert row.pop("resume") == "auto"
    assert found == expected


def test_another_seed_compiles_nothing(command, small, counted, tmp_path):
    done = command("-m", *small, "seed=0,1", "evaluation.rows=0", "hydra.sweep.dir=sweep")
    assert done.code == 0, done.output
    assert guard.compilations() == counted["compiled"][1], str(guard.Recording(counted["compiled"][1]))
    assert metrics(tmp_path / "sweep" / "0")[0] != metrics(tmp_path / "sweep" / "1")[0]


def test_other_data_or_weights_are_loaded_again(command, words, counted, tmp_path):
    other = ["dataset.n_train=40,48"]
    assert command("-m", *words, *other, "hydra.sweep.dir=sweep").code == 0
    assert sorted(counted["loads"]) == ["eval preference"] * 2 + ["parameters"] + ["train preference"] * 2
    sizes = [json.loads((tmp_path / "sweep" / n / "config.json").read_text())["dataset"]["n_train"] for n in "01"]
    assert sizes == [40, 48]
    assert "3 steps over 40 pairs" in (tmp_path / "sweep" / "0" / "log.txt").read_text()
    assert "3 steps over 48 pairs" in (tmp_path / "sweep" / "1" / "log.txt").read_text()
