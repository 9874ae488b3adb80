"""Several schedules at once: the same answers, whatever number of cores deals them out."""

import dataclasses

import jax
import numpy as np
import pytest
from test_generate import prompts_of, run, small  # noqa: F401

from rlhf.sampling import side_by_side
from rlhf.sampling.methods import Greedy, Sample
from rlhf.sampling.programs import Setting
from rlhf.sampling.shapes import Shape
from rlhf.sampling.side_by_side import Parts, parts_of

WIDE = Shape(entries=48, lanes=1, prompt_tokens=32, new_tokens=16)
PROMPTS = prompts_of(np.random.default_rng(3).integers(1, 33, 31))


def with_cores(monkeypatch, n):
    monkeypatch.setattr(side_by_side, "_cores", lambda: n)


@pytest.mark.parametrize("settings", [{"method": Greedy()}, {"method": Sample(), "n": 2, "wants_entropy": True}])
def test_answers_are_those_of_one_schedule(small, monkeypatch, settings):  # noqa: F811
    """31 prompts with limits of their own, ends in the text and stop tokens, by one schedule and by three."""
    limits = [4 + i % 11 for i in range(31)]
    settings = {**settings, "shape": WIDE, "max_new_tokens": limits, "stop_ids": range(6)}
    settings["watch"] = lambda ids: next((place + 1 for place, i in enumerate(ids) if i % 7 == 3), None)
    with_cores(monkeypatch, 1)
    one = run(small, PROMPTS, **settings)
    with_cores(monkeypatch, 3)
    three = run(small, PROMPTS, **settings)
    assert {"stop", "stop_text", "length"} == set(one.finish_reasons)
    assert three.finish_reasons == one.finish_reasons
    np.testing.assert_array_equal(three.tokens, one.tokens)
    np.testing.assert_array_equal(three.n_tokens, one.n_tokens)
    np.testing.assert_allclose(three.logprobs, one.logprobs, atol=1e-5)
    assert 0 < three.utilisation <= 1
    n = settings.get("n", 1)
    for i in (4, 30):  # in another schedule, and with other prompts: none
        alone = run(small, [PROMPTS[i]], rows=[i], **{**settings, "max_new_tokens": limits[i]})
        end = limits[i]
        np.testing.assert_array_equal(alone.logprobs, three.logprobs[i * n : (i + 1) * n, :end])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_one_schedule_is_told_and_ends_the_others(small, monkeypatch, error):  # noqa: F811
    """The second of three fails at its first look; the others would go on for some 160 prompts each."""
    with_cores(monkeypatch, 3)
    seen = []

    def watch(ids):
        seen.append(len(ids))
        if len(seen) == 20:
            raise error("cannot read this")

    with pytest.raises(error, match="cannot read this"):
        run(small, PROMPTS * 16, shape=WIDE, watch=watch)
    assert 20 <= len(seen) < 496 / 2


def test_a_call_is_divided_where_weights_are_small_and_rows_many(small, monkeypatch):  # noqa: F811
    model, params = small
    setting = Setting(model, "float32", None)
    for cores, shape, expected in (
        (1, WIDE, Parts(1, WIDE)),
        (2, WIDE, Parts(2, dataclasses.replace(WIDE, entries=24))),
        (64, WIDE, Parts(3, dataclasses.replace(WIDE, entries=16))),  # no schedule has less than 16 rows
        (2, Shape(5, 8, 32, 16), Parts(2, Shape(3, 8, 32, 16))),
        (2, Shape(1, 64, 32, 16), Parts(1, Shape(1, 64, 32, 16))),  # a prompt's answers stay together
        (2, Shape(24, 1, 32, 16), Parts(1, Shape(24, 1, 32, 16))),
    ):
        with_cores(monkeypatch, cores)
        assert parts_of(setting, shape, params) == expected
    with_cores(monkeypatch, 2)
    large = {"x": jax.ShapeDtypeStruct((3000, 3000), np.float32)}
    assert parts_of(setting, WIDE, large).n == 1
    on_a_mesh = dataclasses.replace(setting, mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]), "data"))
    assert parts_of(on_a_mesh, WIDE, params).n == 1
    with jax.disable_jit():
        assert parts_of(setting, WIDE, params).n == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert parts_of(setting, WIDE, params).n == 1


def test_it_says_how_a_call_is_divided():
    assert str(Parts(2, Shape(32, 1, 48, 256))) == "2 × 32 prompts, ≤ 48 + 256 tokens"
    assert str(Parts(1, Shape(2, 4, 16, 16))) == "2 prompts × 4 answers, ≤ 16 + 16 tokens"


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(side_by_side.os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert side_by_side._cores() == 3
    monkeypatch.delattr(side_by_side.os, "sched_getaffinity")
    monkeypatch.setattr(side_by_side.os, "cpu_count", lambda: None)
    assert side_by_side._cores() == 1
