"""Where reference log-probabilities come from: live, moving with the policy, or from a file that is checked."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table_model import MODEL, TableModel, random_batch, random_params, rows_of, runtime

from rlhf.algorithms.dpo import DPO
from rlhf.algorithms.reference import Frozen, LiveReference, Precomputed, Remembered, Synced, without_adapter
from rlhf.algorithms.reference_cache import CachedReference, cache_file, digest_of, precompute
from rlhf.errors import CheckpointError, ConfigError, DataError

SETTINGS = {"learning_rate": 1e-6, "batch_size": 8, "microbatch_size": 8}
POLICY, REFERENCE = random_params(1), random_params(2)
BATCH = random_batch(5, (8, 2, 12))
LIVE = LiveReference(MODEL, REFERENCE, rows=8)
KEY = {"model": "a", "data": "b", "template": "c"}


def logprobs_of(params, batch=BATCH):
    return np.asarray(MODEL.token_logprobs(params, batch))


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_live_reference_in_slices(rows):
    shapes = []

    def place(inputs):
        shapes.append(inputs["tokens"].shape[0])
        return inputs

    scored = LiveReference(MODEL, REFERENCE, rows, place).token_logprobs(BATCH)
    np.testing.assert_allclose(scored, logprobs_of(REFERENCE))
    assert sum(shapes) == 8
    assert max(shapes) == min(rows, 8)


def test_slices_of_one_shape_compile_once():
    n_traces = 0

    class Counting(TableModel):
        def token_logprobs(self, params, batch, temperature=1.0):
            nonlocal n_traces
            n_traces += 1
            return super().token_logprobs(params, batch)

    live = LiveReference(Counting(), REFERENCE, rows=2)
    live.token_logprobs(BATCH)
    live.with_params(POLICY).token_logprobs({**BATCH, "reference_logprobs": np.zeros(8)})
    assert n_traces == 1


class CountingModel:
    """Counts traces' runs in eager mode: how often it was really asked."""

    calls = 0

    def token_logprobs(self, params, batch, temperature=1.0):
        type(self).calls += 1
        return MODEL.token_logprobs(params, batch, temperature)


def test_a_batch_that_comes_again_is_scored_once(monkeypatch):
    monkeypatch.setattr(CountingModel, "calls", 0)
    live = LiveReference(CountingModel(), REFERENCE, rows=8, remembered=Remembered())
    other = {**BATCH, "tokens": BATCH["tokens"][::-1].copy()}
    with jax.disable_jit():
        first = live.token_logprobs(BATCH)
        assert CountingModel.calls == 1
        np.testing.assert_array_equal(live.token_logprobs({**BATCH}), first)
        assert CountingModel.calls == 1
        np.testing.assert_array_equal(live.token_logprobs(other), logprobs_of(REFERENCE, other))
        live.token_logprobs(BATCH, temperature=0.7)
        live.with_params(POLICY).token_logprobs(BATCH)
    assert CountingModel.calls == 4


def test_what_is_remembered_has_a_limit(monkeypatch):
    monkeypatch.setattr(CountingModel, "calls", 0)
    live = LiveReference(CountingModel(), REFERENCE, rows=8, remembered=Remembered(limit=1))
    with jax.disable_jit():
        for _ in range(2):
            np.testing.assert_array_equal(live.token_logprobs(BATCH), logprobs_of(REFERENCE))
    assert CountingModel.calls == 2


def test_the_reference_under_an_adapter_is_the_base():
    assert without_adapter({"model": 1, "adapter": 2, "adapter_scale": 3}) == {"model": 1}


def synced_logprobs(synced, run, params) -> np.ndarray:
    return np.asarray(synced.scorer(run, params).token_logprobs(BATCH))


def policies(n: int) -> list[dict]:
    return [random_params(10 + i) for i in range(n)]


def test_synced_replaces_the_reference_every_few_batches():
    synced, run, params = Synced(every=2, mixup=1.0), runtime(REFERENCE), policies(5)
    seen = [synced_logprobs(synced, run, p) for p in params]
    for batch, source in enumerate([0, 0, 2, 2, 4]):  # the policy of which batch is the reference
        np.testing.assert_array_equal(seen[batch], logprobs_of(params[source]))


def test_synced_moves_by_mixup():
    synced, run, params = Synced(every=1, mixup=0.25), runtime(REFERENCE), policies(3)
    seen = [synced_logprobs(synced, run, p) for p in params][-1]
    one = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, params[0], params[1])
    two = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, one, params[2])
    np.testing.assert_allclose(seen, logprobs_of(two), rtol=1e-5)


def test_synced_goes_on_from_its_memory():
    """A run that is stopped and given the arrays of its checkpoint is the run that was not stopped."""
    params = policies(6)
    synced, run = Synced(every=2, mixup=0.5), runtime(REFERENCE)
    uninterrupted = [synced_logprobs(synced, run, p) for p in params]
    first, second = runtime(REFERENCE), runtime(REFERENCE)
    for p in params[:3]:
        synced_logprobs(synced, first, p)
    second.memory.update(jax.tree.map(np.asarray, first.memory))
    resumed = [synced_logprobs(synced, second, p) for p in params[3:]]
    np.testing.assert_array_equal(resumed, uninterrupted[3:])


def test_synced_keeps_a_copy_of_the_policy():
    """The trainer gives the policy's buffers away in each update; the reference must not lie in them."""
    params = jax.tree.map(jnp.array, POLICY)
    synced, run = Synced(), runtime(REFERENCE)
    synced_logprobs(synced, run, params)
    jax.tree.map(lambda x: x.delete(), params)
    np.testing.assert_array_equal(synced_logprobs(synced, run, REFERENCE), logprobs_of(POLICY))


def test_synced_keeps_only_the_adapter_twice():
    run = runtime(REFERENCE)
    params = {**POLICY, "adapter": {"a": jnp.ones(3)}}
    scorer = Synced().scorer(run, params)
    assert set(run.memory["reference"]) == {"adapter"}
    assert scorer.params["model"] is POLICY["model"]


def test_evaluation_on_a_copy_of_the_memory_does_not_move_the_reference():
    synced, run = Synced(every=1, mixup=1.0), runtime(REFERENCE)
    synced_logprobs(synced, run, POLICY)
    synced_logprobs(synced, dataclasses.replace(run, memory=dict(run.memory)), REFERENCE)
    assert run.memory["reference_batches"] == 1
    np.testing.assert_array_equal(run.memory["reference"]["model"]["logprobs"], POLICY["model"]["logprobs"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"every": 0}, "every=0 of Synced must be at least 1"), ({"mixup": 0.0}, "mixup=0.0 of Synced must be")],
)
def test_impossible_syncs_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Synced(**settings)


def counting_batches(*batches):
    """A callable that gives the batches, and the list of how often it was read to the end."""
    reads = []

    def give():
        yield from batches
        reads.append(len(batches))

    return give, reads


def test_precomputed_is_computed_once_and_equal(tmp_path):
    other = random_batch(6, (8, 2, 16))
    give, reads = counting_batches(BATCH, other)
    precomputed = Precomputed(cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        cached = precomputed.provide(LIVE, give, KEY)
        assert reads == [2]
    for batch in (BATCH, other):
        np.testing.assert_array_equal(cached.token_logprobs(batch), logprobs_of(REFERENCE, batch))
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [cache_file(tmp_path, KEY).name]


def test_precomputed_does_not_depend_on_order_batching_or_padding(tmp_path):
    cached = Precomputed(cache_dir=tmp_path).provide(LIVE, lambda: iter([BATCH]), KEY)
    shuffled = rows_of(BATCH, np.array([5, 1, 7]))
    wider = {name: np.pad(x, ((0, 0), (0, 0), (0, 4))) if x.ndim == 3 else x for name, x in shuffled.items()}
    np.testing.assert_array_equal(cached.token_logprobs(wider), logprobs_of(REFERENCE, wider))


def test_precomputed_gives_the_loss_of_the_live_reference(tmp_path):
    dpo = DPO(**SETTINGS, reference=Precomputed(cache_dir=tmp_path))
    cached = dpo.reference.provide(LIVE, lambda: iter([BATCH]), KEY)
    assert cached.scorer.params == {}  # the weights are let go
    run = dataclasses.replace(runtime(REFERENCE), reference=cached)
    live = DPO(**SETTINGS, reference=Frozen())
    losses = [
        a.loss(MODEL, POLICY, a.prepare(r, POLICY, BATCH, jax.random.key(0)))[0]
        for a, r in ((dpo, run), (live, runtime(REFERENCE)))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("file", "it is a file"), ("file/below", "Not a directory"), ("x" * 300, "File name too long")],
)
def test_a_folder_that_cannot_be_made_is_told_before_anything_is_scored(tmp_path, folder, reason):
    (tmp_path / "file").touch()
    give, reads = counting_batches(BATCH)
    message = f"algorithm.reference.cache_dir=.*{folder} can't be used as a folder: {reason}"
    with pytest.raises(ConfigError, match=message):
        Precomputed(cache_dir=tmp_path / folder).provide(LIVE, give, KEY)
    assert reads == []


def test_the_digest_of_a_batch_tells_its_arrays():
    assert digest_of(BATCH) == digest_of({name: np.array(x) for name, x in reversed(BATCH.items())})
    changed = {**BATCH, "tokens": BATCH["tokens"] + 1}
    assert len({digest_of(BATCH), digest_of(changed), digest_of(rows_of(BATCH, np.arange(4)))}) == 3


def test_another_held_out_set_has_a_file_of_its_own(command, small, tmp_path):
    words = [*small, "algorithm=dpo_cached", "evaluation.rows=0", "trainer.max_steps=1"]
    for n_rows in (4, 8, 8):
        done = command(*words, f"trainer.eval_rows={n_rows}", f"hydra.run.dir=run{n_rows}", "resume=auto")
        assert done.code == 0, done.output
    assert "going on after step 1 of" in done.output
    assert ": all 1 of 1 steps are done" in done.output
    assert len(list((tmp_path / "reference_cache").iterdir())) == 2


@pytest.fixture
def file(tmp_path):
    path = cache_file(tmp_path, KEY)
    precompute(LIVE, [BATCH], path, KEY)
    return path


def test_another_key_is_another_file(tmp_path):
    assert cache_file(tmp_path, KEY) != cache_file(tmp_path, {**KEY, "template": "d"})


def test_a_file_of_something_else_is_refused(file):
    with pytest.raises(CheckpointError, match=r"computed from something else \(model: 'a' there, 'z' here\)"):
        CachedReference.load(file, {**KEY, "model": "z"}, LIVE, BATCH)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"no reference log-probabilities at .*missing.npz"):
        CachedReference.load(tmp_path / "missing.npz", KEY, LIVE, BATCH)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_cut_file_is_refused(file, keep):
    content = file.read_bytes()
    file.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(CheckpointError, match=r"is damaged \(.*delete it"):
        CachedReference.load(file, KEY, LIVE, BATCH)


def test_a_flipped_bit_is_refused(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="is damaged"):
        CachedReference.load(file, KEY, LIVE, BATCH)


def test_changed_numbers_are_refused_by_the_checksum(file):
    with np.load(file) as stored:
        arrays = dict(stored)
    arrays["logprobs"] = arrays["logprobs"] + np.float32(1e-3)
    np.savez(file, **arrays)
    with pytest.raises(CheckpointError, match="checksum mismatch"):
        CachedReference.load(file, KEY, LIVE, BATCH)


def test_rows_are_computed_again_and_compared(file):
    """The key says the same model, but the numbers are another's."""
    with pytest.raises(CheckpointError, match=r"rows computed again differ by [\d.]+ nats per token"):
        CachedReference.load(file, KEY, LiveReference(MODEL, POLICY, rows=8), BATCH)


def test_a_row_that_was_not_computed_is_refused(file):
    cached = CachedReference.load(file, KEY, LIVE, BATCH)
    changed = {**BATCH, "tokens": BATCH["tokens"].copy()}
    changed["tokens"][6, 1, 0] += 1
    with pytest.raises(DataError, match="row 6 is not among the reference log-probabilities"):
        cached.token_logprobs(changed)


def test_a_write_that_fails_leaves_no_file(tmp_path):
    def broken():
        yield BATCH
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        precompute(LIVE, broken(), tmp_path / "x.npz", KEY)
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_file_is_not_picked_up(file, tmp_path):
    """What a killed process leaves has another name, and the next run computes and writes its own."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(file, other / f"{file.name}.123.tmp")
    give, reads = counting_batches(BATCH)
    Precomputed(cache_dir=other).provide(LIVE, give, KEY)
    assert reads == [1]


def test_the_header_tells_what_a_file_was_computed_from(file):
    with np.load(file) as stored:
        assert json.loads(bytes(stored["header"]))["key"] == KEY
