"""What is saved comes back bit for bit, in the structure, kinds and placement that the run asks for."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf.errors import CheckpointError, ConfigError
from rlhf.ops.optimizers import Adafactor, AdamW, Lion, RMSProp
from rlhf.train import guard
from rlhf.train.checkpoint import Checkpoints, load_parameters, parameters_digest, read_record


def bits(leaf) -> bytes:
    if jnp.issubdtype(getattr(leaf, "dtype", None) or np.dtype(int), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.shape(one) == np.shape(other)
        assert getattr(one, "dtype", type(one)) == getattr(other, "dtype", type(other))
        assert bits(one) == bits(other)


def state(seed: int = 0) -> dict:
    """A small training state with every kind of leaf that a run has."""
    random = np.random.default_rng(seed)
    return {
        "params": {
            "embed": jnp.asarray(random.normal(size=(8, 4)), jnp.float32),
            "layers": {"query": jnp.asarray(random.normal(size=(2, 4, 4)), jnp.bfloat16), "none": {}},
        },
        "optimizer": (jnp.asarray(random.normal(size=(3,)), jnp.float32), [jnp.int32(seed)]),
        "memory": {},
        "key": jax.random.key(seed),
    }


@pytest.fixture
def run(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "run" / "checkpoints", max_to_keep=3)


def test_every_kind_of_leaf_comes_back(run):
    odd_bits = np.array([0x7FC01234, 0xFFC00001, 0x80000000, 0x00000001], np.uint32).view(np.float32)
    tree = {
        "nan payloads": jnp.asarray(odd_bits),
        "dots.and/slashes": {"a.b": jnp.arange(3), "a": {"b": jnp.arange(4)}},
        "very" * 30: {"long" * 30: jnp.ones(2)},
        "bfloat16": jnp.array([1.5, -0.0, jnp.nan], jnp.bfloat16),
        "float8": jnp.array([1.5, -2], jnp.float8_e4m3fn),
        "4 bits": jnp.array([1, -2, 7], jnp.int4),
        "4 bits unsigned": jnp.array([[1, 15]], jnp.uint4),
        "bool": jnp.array([True, False]),
        "scalar": jnp.float32(3.1),
        "weak": jnp.asarray(0.1),
        "weak vector": jnp.broadcast_to(jnp.asarray(2), (3,)),
        "keys": jax.random.split(jax.random.key(3), 5),
        "other generator": jax.random.key(3, impl="rbg"),
        "no elements": jnp.zeros((0, 3), jnp.bfloat16),
        "no keys": jax.random.split(jax.random.key(3), 5)[:0],
        "numpy": np.array([1 / 3, np.pi]),
        "numpy scalar": np.float64(1 / 3),
        "numpy bfloat16": np.array([1.5], ml_dtypes.bfloat16),
        "zeros": jnp.zeros((4, 4)),
        "float": 1 / 3,
        "int": 2**40,
        "yes": True,
        "nothing": {"none": None, "tuple": ()},
    }
    run.save(1, tree, {})
    found, _ = run.restore(tree)
    assert_same(found, tree)
    for name in ("weak", "weak vector", "scalar", "zeros"):
        assert found[name].weak_type == tree[name].weak_type, name
        assert found[name].committed == tree[name].committed, name
    for name in ("numpy", "numpy scalar", "float", "int", "yes"):
        assert type(found[name]) is type(tree[name]), name


def test_a_leaf_alone_and_a_tree_without_arrays(run):
    run.save(1, jnp.arange(3), {})
    assert_same(run.restore(jnp.zeros(3, jnp.int32))[0], jnp.arange(3))
    run.save(2, {"params": {}}, {"a": 1})
    assert run.restore({"params": {}})[0] == {"params": {}}
    assert load_parameters(run.folder)[0] == {}


@pytest.mark.parametrize(
    "optimizer", [AdamW(weight_decay=0.1), Adafactor(), Lion(), RMSProp()], ids=lambda o: type(o).__name__
)
def test_a_resumed_optimizer_takes_the_same_step(run, optimizer):
    transform = optimizer.transform(1e-2)
    params = {"w": jnp.linspace(-1, 1, 256 * 256).reshape(256, 256), "norm": jnp.ones(256)}
    gradient = jax.tree.map(jnp.sin, params)
    update = jax.jit(transform.update)
    _, moments = update(gradient, transform.init(params), params)
    run.save(1, {"params": params, "optimizer": moments}, {})
    fresh = {"params": jax.tree.map(jnp.zeros_like, params), "optimizer": transform.init(params)}
    found, _ = run.restore(fresh)
    assert_same(found["optimizer"], moments)
    with guard.record_compilations() as recording:
        resumed = update(gradient, found["optimizer"], found["params"])
    assert_same(resumed, update(gradient, moments, params))
    assert recording.names["update"] == 0, "what was restored must fit the program that is there"


def test_sharded_arrays_come_back_on_another_mesh(run):
    def place(tree, shape, **specs):
        mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        return {
            name: jax.device_put(tree[name], NamedSharding(mesh, PartitionSpec(*specs[name]))) for name in sorted(tree)
        }

    values = {"b": jnp.ones(8, jnp.bfloat16), "q": jnp.arange(8).astype(jnp.uint4)}
    values |= {"k": jax.random.split(jax.random.key(0), 8), "w": jnp.arange(64.0).reshape(8, 8)}
    before = place(values, (4, 2), w=("data", "tensor"), b=(), q=("data",), k=())
    others = jax.tree.map(lambda x: x[::-1], values)
    after = place(others, (1, 8), w=(None, "tensor"), b=("tensor",), q=(), k=("tensor",))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), after)
    run.save(1, before, {})
    for target in (after, abstract):
        found, _ = run.restore(target)
        assert_same(found, values)
        assert {name: x.sharding for name, x in found.items()} == {name: x.sharding for name, x in after.items()}


def test_saving_replicated_arrays_compiles_nothing(run):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tree = {"w": jax.device_put(jnp.ones((16, 3)), NamedSharding(mesh, PartitionSpec()))}
    with guard.forbid_compilations("a save"):
        run.save(1, tree, {})
    assert_same(run.restore(tree)[0], tree)


def test_the_record_comes_back_with_step_and_versions(run):
    record = {
        "seed": 3,
        "config": {"beta": 0.1, "betas": (0.9, 0.95), "text": "\ud800 ü \u2028"},
        "limit": float("inf"),
    }
    run.save(7, state(), record)
    found = run.restore(state())[1]
    assert found == run.record() == run.record(7) == read_record(run.folder.parent)
    assert found["versions"]["jax"] == jax.__version__
    assert {**record, "config": {**record["config"], "betas": [0.9, 0.95]}} == {name: found[name] for name in record}
    assert found["step"] == 7


def test_a_record_without_json_form_loses_nothing(run):
    run.save(1, state(), {})
    with pytest.raises(
        CheckpointError, match=r"record of step 2 can't be written as JSON: path=.*PosixPath.*nothing was saved"
    ):
        run.save(2, state(), {"seed": 1, "path": Path("/tmp")})
    assert run.steps() == [1]
    run.save(2, state(1), {"seed": 1})
    assert_same(run.restore(state())[0], state(1))


def test_a_leaf_that_is_no_array_is_named(run):
    with pytest.raises(TypeError, match="params/name is a str, not an array or a number"):
        run.save(1, {"params": {"name": "x"}}, {})
    assert run.steps() == []


def test_the_newest_stay(tmp_path):
    run = Checkpoints(tmp_path / "checkpoints", max_to_keep=2)
    for step in (1, 2, 3, 10):
        run.save(step, state(step), {})
    assert run.steps() == [3, 10]
    assert sorted(path.name for path in run.folder.iterdir()) == ["step_10", "step_3"]
    assert_same(run.restore(state(), step=3)[0], state(3))
    with pytest.raises(CheckpointError, match=f"no checkpoint of step 4 in {run.folder}"):
        run.restore(state(), step=4)
    with pytest.raises(ConfigError, match="max_to_keep=0 of Checkpoints must be at least 1"):
        Checkpoints(tmp_path, max_to_keep=0)


def test_the_same_step_again_replaces_it(run):
    run.save(1, state(1), {})
    run.save(1, state(2), {})
    assert [path.name for path in run.folder.iterdir()] == ["step_1"]
    assert_same(run.restore(state())[0], state(2))


@pytest.mark.parametrize("has_new", [True, False])
def test_a_replacement_that_was_killed_is_finished_or_undone(run, has_new):
    run.save(1, state(1), {})
    os.rename(run.path(1), run.folder / "step_1.old")
    if has_new:
        run.save(2, state(2), {})
        os.rename(run.path(1), run.folder / "step_1.old")
        os.rename(run.path(2), run.path(1))
    run.save(3, state(3), {})
    assert run.steps() == [1, 3]
    assert_same(run.restore(state(), step=1)[0], state(2 if has_new else 1))


def test_half_written_and_half_deleted_folders_are_not_seen_and_go_away(run):
    run.save(1, state(1), {})
    for name in ("step_2.partial", "step_0.partial"):
        (run.folder / name / "arrays").mkdir(parents=True)
        (run.folder / name / "manifest.json").write_text("{}")
    assert run.steps() == [1]
    run.save(2, state(2), {})
    assert sorted(path.name for path in run.folder.iterdir()) == ["step_1", "step_2"]


def test_another_model_is_refused_with_the_array(run):
    folder = run.save(1, state(), {})
    other = state()
    other["params"]["embed"] = jnp.zeros((8, 5))
    with pytest.raises(
        CheckpointError, match=rf"{folder}: array params/embed is float32\[8, 4\], .* needs float32\[8, 5\]"
    ):
        run.restore(other)
    other = state()
    other["params"]["layers"]["query"] = jnp.zeros((2, 4, 4))
    with pytest.raises(
        CheckpointError, match=r"params/layers/query is bfloat16\[2, 4, 4\], .* needs float32\[2, 4, 4\]"
    ):
        run.restore(other, allow_older=True)
    other = state()
    other["memory"] = {"mean": jnp.zeros(()), "n": jnp.zeros(())}
    with pytest.raises(CheckpointError, match="array memory/mean and 1 more this run needs and it lacks"):
        run.restore(other)
    other = state()
    del other["params"]["embed"]
    with pytest.raises(CheckpointError, match="array params/embed it has and this run does not"):
        run.restore(other)


def test_no_checkpoint(run, tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint in {run.folder}"):
        run.restore(state())
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}: a run's folder or one of its"):
        load_parameters(tmp_path)


def test_parameters_alone_from_run_folder_or_checkpoint(run):
    run.save(1, state(1), {"seed": 1})
    folder = run.save(2, state(2), {"seed": 2})
    for path, seed in ((run.folder.parent, 2), (run.folder, 2), (folder, 2), (run.path(1), 1)):
        params, record = load_parameters(path)
        assert_same(params, jax.tree.map(np.asarray, state(seed)["params"]))
        assert record["seed"] == seed
    placed, _ = load_parameters(folder, target=state()["params"])
    assert_same(placed, state(2)["params"])
    assert isinstance(placed["embed"], jax.Array)
    assert_same(
        load_parameters(folder, key="optimizer")[0], [np.asarray(state(2)["optimizer"][0]), [np.asarray(np.int32(2))]]
    )
    with pytest.raises(CheckpointError, match="step 2 has no 'adapter'; it has key, optimizer, params"):
        load_parameters(folder, key="adapter")


def test_parameters_are_read_without_the_optimizer(run):
    folder = run.save(1, state(1), {})
    for path in (folder / "arrays").glob("optimizer*/*"):
        path.unlink()
    assert_same(load_parameters(folder)[0], jax.tree.map(np.asarray, state(1)["params"]))


def test_the_digest_of_the_parameters_is_of_the_parameters_alone(run):
    one, same, other = state(1), state(2) | {"params": state(1)["params"]}, state(2)
    for step, tree in enumerate((one, same, other), 1):
        run.save(step, tree, {"seed": step})
    digests = [parameters_digest(run.path(step)) for step in (1, 2, 3)]
    assert digests[0] == digests[1] != digests[2]
    assert parameters_digest(run.folder.parent) == digests[2]


def test_a_target_for_memory_comes_from_the_checkpoint(run):
    memory = {
        "mean": jnp.float32(2),
        "weak": jnp.asarray(0.5),
        "n": 3,
        "seen": np.array([1.5]),
        "key": jax.random.key(1),
    }
    run.save(1, {"params": {"w": jnp.ones(2)}, "memory": memory}, {})
    target = {"params": {"w": jnp.zeros(2)}, "memory": run.abstract("memory")}
    found, _ = run.restore(target)
    assert_same(found["memory"], memory)
    assert found["memory"]["weak"].weak_type
    run.save(2, {"params": {"w": jnp.ones(2)}, "memory": {}}, {})
    assert run.abstract("memory") == {}


def test_a_disk_that_refuses_leaves_the_good_checkpoint(run, monkeypatch):
    run.save(1, state(1), {})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf.train.manifest.write", full)
    with pytest.raises(
        CheckpointError, match=f"checkpoint {run.path(2)} could not be written: .*No space left on device"
    ):
        run.save(2, state(2), {})
    assert [path.name for path in run.folder.iterdir()] == ["step_1"]
    assert_same(run.restore(state())[0], state(1))


def test_a_checkpoint_of_another_format_is_told(run):
    folder = run.save(1, state(1), {})
    wrapped = json.loads((folder / "manifest.json").read_text())
    assert wrapped["content"]["format"] == 1
    from rlhf.train import manifest

    wrapped["content"]["format"] = 9
    wrapped["sha256"] = manifest._sha256(manifest._canonical(wrapped["content"]))
    (folder / "manifest.json").write_text(json.dumps(wrapped))
    with pytest.raises(CheckpointError, match="has format 9; this release reads format 1"):
        run.restore(state(), allow_older=True)
