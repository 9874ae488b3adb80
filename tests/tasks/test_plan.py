"""`task=plan`: what it adds up, that it needs nothing, and that processes then need as much."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from rlhf.algorithms.rehearsal import rehearse
from rlhf.model.gemma3 import Gemma3
from rlhf.run import CONF
from rlhf.sections import settings
from rlhf.tasks import plan
from rlhf.train.plan import Need, largest_microbatch, need_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments" / "memory"))


def composed(*words):
    with initialize_config_dir(CONF, version_base="1.3"):
        return settings(compose("config", overrides=["task=plan", *words]))


def test_a_plan_names_its_parts_and_writes_them_down(command, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a plan must not use the network"))
    done = command(
        "task=plan", "model=tiny", "model.checkpoint=google/gemma-3-1b-it", "hardware=gpu_24gb", "hydra.run.dir=run",
        "dataset.max_length=64", "algorithm.batch_size=4", "algorithm.microbatch_size=2",
    )  # fmt: skip
    assert done.code == 0, done.output
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    n = Gemma3(composed("model=tiny").model.architecture()).n_parameters()
    assert found["trained weights bytes"] == 4 * n
    assert found["optimizer bytes"] == pytest.approx(8 * n, abs=16)
    assert "Python and programs bytes" not in found  # beside a GPU they have memory of their own
    assert found["frozen weights bytes"] == found["reference bytes"] == 0
    assert found["limit_bytes"] == pytest.approx(24e9 * 0.92)
    assert found["fits"]
    assert found["advice"] == {"none": 4, "block": 4}
    assert "fits" in done.output
    assert "microbatch_size up to 4" in done.output


def test_what_does_not_fit_is_said(command, tmp_path):
    words = ("task=plan", "model=tiny", "hardware.memory_gb=0.001", "dataset.max_length=64", "hydra.run.dir=run")
    done = command(*words, "hardware=cpu")
    assert done.code == 0, done.output
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["Python and programs bytes"] == 5 * 10**8
    assert "does not fit" in done.output
    assert "no microbatch and no remat helps" in done.output


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("algorithm=sft",), {"weight", "tokens"}),
        (("algorithm=dpo",), {"reference_logprobs"}),
        (("algorithm=kto",), {"kl", "is_desirable"}),
        (("algorithm=reward_model",), {"value"}),
        (("algorithm=grpo", "reward=length"), {"advantages", "reference_logprobs"}),
        (("algorithm=ppo", "reward=length", "model.lora.rank=2"), {"returns", "old_values"}),
    ],
)
def test_a_rehearsal_gives_the_arrays_of_every_kind_of_algorithm(words, names):
    s = composed(*words, "algorithm.batch_size=4", "algorithm.microbatch_size=4", "dataset.max_length=32")
    setup = plan.Plan().setup(s, None)
    assert names <= set(setup.batch)
    rows = s.algorithm.rows_per_batch
    assert {x.shape[0] for x in setup.batch.values() if x.shape} == {rows}
    longest = 32 + getattr(s.algorithm, "max_new_tokens", 0)
    assert setup.batch["tokens"].shape[-1] == longest
    assert rehearse(s.algorithm, s.model.architecture(), {**setup.frozen, **setup.trainable}, 32, s.sampling).batch
    jax.eval_shape(
        lambda params, batch: s.algorithm.loss(setup.model, params, batch),
        {**setup.frozen, **setup.trainable},
        setup.batch,
    )


def test_a_shared_base_is_counted_once_and_a_reference_twice():
    full = plan.Plan().setup(composed("algorithm=dpo", "dataset.max_length=32"), None)
    assert set(full.reference) == {"model"}
    adapter = plan.Plan().setup(composed("algorithm=dpo", "dataset.max_length=32", "model.lora.rank=2"), None)
    assert adapter.reference == {}
    cached = plan.Plan().setup(composed("algorithm=dpo_cached", "dataset.max_length=32"), None)
    assert cached.reference == {}


@pytest.mark.parametrize("kind", ["cudnn", "splash"])
def test_a_kernel_of_another_device_is_planned_as_what_runs_everywhere(kind, caplog):
    caplog.set_level("INFO")
    words = ("model=tiny", "hardware=gpu_24gb", "dataset.max_length=32")
    setup = plan.Plan().setup(composed(*words, f"hardware.attention={kind}"), None)
    assert setup == plan.Plan().setup(composed(*words), None)
    assert f"hardware.attention={kind} runs on its own devices only: attention is planned as xla" in caplog.text


def test_generation_that_does_not_fit_is_told_of(caplog):
    """With int8 its weights are half as large; an embedding that is in the type of generation is not copied."""
    caplog.set_level("INFO")
    words = ("algorithm=grpo", "reward=length", "hardware.param_dtype=bfloat16", "hardware.compute_dtype=bfloat16")
    s = composed(*words, "dataset.max_length=32")
    setup = plan.Plan().setup(s, None)
    plain = plan.Plan()._generation(s, setup)["decoding weights"]
    narrow = composed(*words, "dataset.max_length=32", "sampling.weights=int8")
    assert 0.5 * plain < plan.Plan()._generation(narrow, setup)["decoding weights"] < 0.55 * plain
    plan.Plan()._tell_of_generation(s, setup, Need({"weights": 10**10}, 0, 0))
    assert "whatever the microbatch: sampling.weights=int8 brings its peak to 10." in caplog.text


def test_parameters_on_a_mesh_are_divided():
    words = ("dataset.max_length=32", "algorithm.batch_size=8", "algorithm.microbatch_size=8")
    whole = need_of(plan.Plan().setup(composed(*words), None))
    s = composed(*words, "hardware.mesh.fsdp=4")
    split = need_of(plan.Plan().setup(s, plan._mesh(s)))
    assert split.parts["trained weights"] < 0.27 * whole.parts["trained weights"]
    assert split.peak < 0.45 * whole.peak


def test_the_largest_microbatch_is_read_off_a_line():
    setup, asked = plan.Plan().setup(composed("dataset.max_length=32"), None), []

    def need(other):
        asked.append(other.algorithm.microbatch_size)
        return Need({"weights": 100}, 0, 10 * other.algorithm.microbatch_size)

    assert largest_microbatch(setup, 145, [1, 2, 4, 8], need) == 4
    assert asked == [8, 1, 2]
    assert largest_microbatch(setup, 180, [1, 2, 4, 8], need) == 8
    assert largest_microbatch(setup, 105, [1, 2, 4, 8], need) is None


@pytest.mark.slow
def test_predictions_are_within_a_tenth_of_what_processes_need():
    import plan_check

    for name, words in plan_check.CONFIGS.items():
        found = plan_check.run_apart(words)
        assert found["predicted"] == pytest.approx(found["measured"], rel=0.1), name


def test_the_stand_in_for_bfloat16_is_as_large():
    assert plan.stand_in("float32") == "float32"
    assert jnp.dtype(plan.stand_in("bfloat16")).itemsize == 2
    assert np.dtype(plan.stand_in("bfloat16")) == np.float16
