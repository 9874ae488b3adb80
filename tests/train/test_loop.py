"""The loop around an algorithm: what is written when, what stops it, minibatches, memory, and many devices."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.algorithms.base import Algorithm, Runtime
from rlhf.algorithms.sft import SFT
from rlhf.config import config
from rlhf.errors import TrainingError
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.model.sharding import make_mesh, place
from rlhf.ops.optimizers import AdamW, Constant, Linear
from rlhf.train.job import Job
from rlhf.train.loop import Trainer
from rlhf.train.settings import TrainerSettings


@config
class Line(Algorithm):
    """Least squares; what a real algorithm may do, in the smallest form: it counts its batches in the memory."""

    form = "conversation"

    first_loss: float | None = None

    def expected_first_loss(self):
        return self.first_loss

    def prepare(self, runtime, params, batch, key):
        runtime.memory["n_prepared"] = runtime.memory.get("n_prepared", jnp.int32(0)) + 1
        noise = jax.random.normal(key, batch["y"].shape)  # a rollout, say: it depends on the step's key
        return {**batch, "y": batch["y"] + 0.1 * noise, "scale": jnp.float32(1.0)}

    def loss(self, model, params, batch):
        error = (batch["x"] @ params["model"]["matrix"] - batch["y"]) * batch["scale"]
        loss = jnp.mean(jnp.sum(error**2, axis=-1))
        return loss, {"error": loss}


class Rows:
    """`n_rows` rows in order, over and over. poisoned: rows that make the loss NaN."""

    fingerprint = "rows"

    def __init__(self, n_rows: int = 32, batch_size: int = 8, poisoned: tuple[int, ...] = ()):
        self.n_rows, self.batch_size = n_rows, batch_size
        rng = np.random.default_rng(0)
        self.x, self.y = rng.normal(size=(n_rows, 3)), rng.normal(size=(n_rows, 2))
        self.x[list(poisoned)] = np.nan

    def __getitem__(self, step):
        rows = np.arange(step * self.batch_size, (step + 1) * self.batch_size) % self.n_rows
        arrays = {"x": self.x[rows].astype(np.float32), "y": self.y[rows].astype(np.float32)}
        return {**arrays, "row": rows.astype(np.int32), "segments": np.ones((len(rows), 5), np.int32)}


@dataclasses.dataclass(frozen=True)
class NoModel:
    compute_dtype: str = "float32"


def line(**settings) -> Line:
    sizes = {"batch_size": 8, "microbatch_size": 4, "learning_rate": 0.1, "schedule": Constant()}
    return Line(**sizes | settings)


def job(folder, algorithm=None, batches=None, **settings) -> Job:
    """A job on `Line`; settings of the trainer by name, those of the job as they are."""
    folder.mkdir(exist_ok=True)
    algorithm = algorithm or line()
    own = {field.name for field in dataclasses.fields(Job)}
    parts = {name: settings.pop(name) for name in list(settings) if name in own}
    return Job(
        **{
            "folder": folder,
            "model": NoModel(),
            "algorithm": algorithm,
            "runtime": Runtime(NoModel(), None),
            "trainable": {"model": {"matrix": jnp.ones((3, 2))}},
            "frozen": {},
            "batches": batches or Rows(),
            "held_out": None,
            "settings": TrainerSettings(**{"max_steps": 10, "epochs": None} | settings),
            "seed": 0,
            "record": {"config": {}},
        }
        | parts
    )


def rows(folder, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def trained(a_job: Job) -> Trainer:
    trainer = Trainer(a_job)
    trainer.fit()
    return trainer


def test_rows_are_written_when_they_are_due_and_once(tmp_path):
    def sample(params, step):
        return [{"text": f"at {step}"}]

    rhythm = {"log_every": 3, "eval_every": 4, "checkpoint_every": 5, "samples_every": 6, "max_to_keep": 9}
    evaluate = lambda params, is_start: {"accuracy": 0.5}  # noqa: E731
    trained(job(tmp_path, held_out=Rows()[0], evaluate=evaluate, sample=sample, **rhythm))
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [0, 3, 4, 6, 8, 9, 10]
    assert [row["step"] for row in found if "val/loss" in row] == [0, 4, 8, 10]
    assert [row["step"] for row in found if row.get("val/accuracy") == 0.5] == [0, 4, 8, 10]
    assert [row["step"] for row in found if "loss" in row] == [3, 4, 6, 8, 9, 10]
    assert [row["step"] for row in rows(tmp_path, "samples.jsonl")] == [0, 6]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_5", "step_10"}


def test_nothing_is_written_that_was_switched_off(tmp_path):
    trained(job(tmp_path, log_every=0))
    assert [row["step"] for row in rows(tmp_path)] == [10]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_10"}


def test_held_out_rows_leave_no_trace_in_the_memory(tmp_path):
    trainer = trained(job(tmp_path, held_out=Rows()[0], eval_every=2))
    assert int(trainer.job.runtime.memory["n_prepared"]) == 10


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_resumed_run_has_the_same_state(tmp_path, minibatches):
    algorithm = line(minibatches=minibatches, epochs=2, schedule=Linear())
    whole = trained(job(tmp_path / "whole", algorithm))
    stopped = trained(job(tmp_path / "cut", algorithm, max_steps=10, checkpoint_every=4, max_to_keep=9))
    for name in ("step_10", "step_8"):
        (tmp_path / "cut" / "checkpoints" / name).rename(tmp_path / name)
    again = Trainer(job(tmp_path / "cut", algorithm, resume=True))
    assert again.start == 4
    again.fit()
    for trainer in (stopped, again):
        assert jax.tree.all(jax.tree.map(np.array_equal, trainer.state, whole.state))
        assert int(trainer.job.runtime.memory["n_prepared"]) == 10
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows(tmp_path / name)]
        for name in ("whole", "cut")
    ]
    assert timeless[0] == timeless[1]


def test_a_finished_run_returns_what_it_had(tmp_path):
    first, last = Trainer(job(tmp_path, held_out=Rows()[0])).fit()
    again = Trainer(job(tmp_path, held_out=Rows()[0], resume=True)).fit()
    assert again[0]["val/loss"] == first["val/loss"]
    assert again[1]["val/loss"] == last["val/loss"]
    assert again[1]["loss"] == last["loss"]
    assert [row["step"] for row in rows(tmp_path)] == list(range(11))


def test_epochs_and_minibatches_take_every_row_once_an_epoch(tmp_path):
    trainer = Trainer(job(tmp_path, line(epochs=2, minibatches=2, microbatch_size=4, schedule=Linear()), max_steps=3))
    update, parts = trainer.update, []

    def noted(state, frozen, batch, algorithm, n_updates, **statics):
        parts.append((np.asarray(batch["row"]), batch["scale"].shape, int(n_updates)))
        return update(state, frozen, batch, algorithm, n_updates, **statics)

    trainer.update = noted
    trainer.fit()
    assert len(parts) == 3 * 2 * 2
    assert {(shape, n_updates) for _, shape, n_updates in parts} == {((), 12)}
    orders = []
    for step in range(3):
        for epoch in range(2):
            at = 4 * step + 2 * epoch
            taken = np.concatenate([parts[at][0], parts[at + 1][0]])
            assert sorted(taken) == list(range(8 * step, 8 * step + 8))
            orders.append(tuple(taken % 8))
    assert len(set(orders)) > 4  # shuffled, and each epoch anew
    assert int(trainer.state["n_updates"]) == 12
    found = rows(tmp_path)
    # the schedule counts updates: a tenth of 12 is one warm-up step, then a line over the other 11
    expected = np.mean([0.1 * (1 - (k - 1) / 11) for k in (8, 9, 10, 11)])
    assert found[-1]["learning_rate"] == pytest.approx(expected, rel=1e-5)
    assert [row["step"] for row in found] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_with_all_one_needs(tmp_path):
    batches = Rows(n_rows=80, poisoned=(43,))  # in the sixth batch
    with pytest.raises(TrainingError) as error:
        trained(job(tmp_path, batches=batches, checkpoint_every=2))
    text = str(error.value)
    assert "loss=nan and grad_norm=nan at step 6; rows of the batch: [40, 41, 42, 43, 44, 45, 46, 47]" in text
    assert f"last good checkpoint: {tmp_path / 'checkpoints' / 'step_4'}" in text
    assert "trainer.on_nonfinite=skip leaves such updates out and counts them" in text
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_2", "step_4"}


def test_what_stops_a_step_keeps_none_before_it_out_of_the_log(tmp_path):
    class Failing(Rows):
        def __getitem__(self, step):
            if step == 3:
                raise TrainingError("the third has failed")
            return super().__getitem__(step)

    with pytest.raises(TrainingError, match="the third has failed"):
        trained(job(tmp_path / "run", batches=Failing(), log_every=1, max_steps=6))
    assert [row["step"] for row in rows(tmp_path / "run") if row["step"]] == [1, 2, 3]


def test_without_a_checkpoint_it_says_so(tmp_path):
    with pytest.raises(TrainingError, match=r"at step 1; rows of the batch: .* last good checkpoint: none yet"):
        trained(job(tmp_path, batches=Rows(poisoned=(0,))))


def test_skipping_leaves_parameters_and_optimizer_as_they_were(tmp_path, caplog):
    algorithm = line(optimizer=AdamW(weight_decay=0.1))
    batches = Rows(n_rows=80, poisoned=(43,))
    before = trained(job(tmp_path / "before", algorithm, batches, max_steps=5))
    after = trained(job(tmp_path / "after", algorithm, batches, max_steps=6, on_nonfinite="skip"))
    for name in ("params", "optimizer"):
        assert jax.tree.all(jax.tree.map(np.array_equal, before.state[name], after.state[name]))
    assert "at step 6; rows of the batch: [40, 41" in caplog.text
    assert "the update was skipped" in caplog.text
    on = trained(job(tmp_path / "on", algorithm, batches, max_steps=10, on_nonfinite="skip"))
    found = rows(tmp_path / "on")
    assert [row["n_skipped"] for row in found] == [0] * 5 + [1] * 5
    assert found[5]["loss"] == "NaN"
    assert all(np.isfinite(row["loss"]) for row in found[6:])
    assert not np.array_equal(on.state["params"]["model"]["matrix"], after.state["params"]["model"]["matrix"])


def test_the_self_check_compares_the_first_loss(tmp_path, caplog):
    caplog.set_level("INFO")
    plain = trained(job(tmp_path / "plain", max_steps=1))
    assert "self-check" not in caplog.text
    first = rows(tmp_path / "plain")[0]["loss"]
    trained(job(tmp_path / "right", line(first_loss=first), max_steps=1))
    assert f"self-check: first loss {first:.6f}, expected {first:.6f}: ok" in caplog.text
    with pytest.raises(TrainingError, match=r"self-check failed: the first loss is .* it must be 0\.693147"):
        trained(job(tmp_path / "wrong", line(first_loss=0.693147), max_steps=1))
    assert plain.n_steps == 1


def test_eager_steps_are_the_compiled_ones(tmp_path):
    compiled, eager = (trained(job(tmp_path / str(e), max_steps=3, eager=e)) for e in (False, True))
    for a, b in zip(jax.tree.leaves(compiled.state), jax.tree.leaves(eager.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_length_of_a_run():
    assert TrainerSettings(epochs=2.0).n_steps(10, 4) == 5
    assert TrainerSettings(epochs=0.5).n_steps(10, 4) == 2  # the second is half of what is left over
    assert TrainerSettings(epochs=3.0, max_steps=4).n_steps(100, 10) == 4
    assert TrainerSettings(epochs=None, max_steps=40).n_steps(100, 10) == 40


GEMMA = Gemma3(
    Architecture(
        vocab_size=64, width=32, ff_width=64, layers=2, heads=4, kv_heads=2, head_width=8, query_scale=8**-0.5,
        window=8, pattern=2,
    )
)  # fmt: skip


class Sentences(Rows):
    """Rows of words of different lengths."""

    def __getitem__(self, step):
        rng = np.random.default_rng(step)
        tokens = rng.integers(1, 64, (self.batch_size, 24), dtype=np.int32)
        is_token = np.arange(24)[None] < rng.integers(4, 25, (self.batch_size, 1))
        positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape) * is_token
        return {
            "tokens": tokens * is_token, "is_answer": is_token & (positions > 2), "positions": positions,
            "segments": is_token.astype(np.int32), "row": np.arange(self.batch_size, dtype=np.int32),
        }  # fmt: skip


def on_mesh(folder, shape: tuple[int, int, int]) -> Trainer:
    mesh = make_mesh(*shape)
    algorithm = SFT(learning_rate=0.01, batch_size=16, microbatch_size=8, optimizer=AdamW(eps=1e-4))
    start = place(jax.device_put({"model": GEMMA.initialise(0)}, may_alias=False), mesh)
    parts = {"model": GEMMA, "runtime": Runtime(GEMMA, None), "trainable": start, "mesh": mesh}
    return trained(job(folder, algorithm, Sentences(batch_size=16), max_steps=3, **parts))


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return on_mesh(folder, (1, 1, 1)), rows(folder)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=lambda shape: "x".join(map(str, shape)))
def test_many_devices_give_what_one_gives(tmp_path, one_device, shape):
    single, expected = one_device
    trainer = on_mesh(tmp_path, shape)
    for found, row in zip(rows(tmp_path), expected, strict=True):
        assert found["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)
        assert found["n_tokens"] == row["n_tokens"]
    state = trainer.state
    for a, b in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(single.state["params"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    moments = {"params": state["params"], "optimizer": state["optimizer"]}
    _, fsdp, tensor = shape
    for part, tree in moments.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path[-1:], simple=True)
            parts = {"gate_up": fsdp * tensor, "embedding": fsdp * tensor, "query": fsdp * min(tensor, 4)}.get(name)
            if parts is not None:  # split, not copied: so are the optimizer's two moments
                assert leaf.addressable_shards[0].data.size * parts == leaf.size, f"{part} {name}"


def test_a_step_that_is_done_on_its_return_gets_its_own_time(tmp_path, monkeypatch):
    trainer = Trainer(job(tmp_path, max_steps=4))
    update = trainer.update

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return jax.block_until_ready(update(*args, **kwargs))

    monkeypatch.setattr(trainer, "update", slow)
    trainer.fit()
    assert all(row["seconds"] >= 0.05 for row in rows(tmp_path) if "seconds" in row)
    assert sum("seconds" in row for row in rows(tmp_path)) == 4
