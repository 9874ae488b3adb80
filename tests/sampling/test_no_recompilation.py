"""After warm-up nothing compiles, whatever is asked; and which shapes are planned."""

import dataclasses
import logging
import threading

import jax
import numpy as np
import pytest
from test_generate import SMALL

from rlhf.errors import TrainingError
from rlhf.model.gemma3 import Gemma3
from rlhf.model.tokenizer import Tokenizer
from rlhf.sampling import side_by_side
from rlhf.sampling.ahead import IN_BACKGROUND
from rlhf.sampling.methods import Greedy, Sample
from rlhf.sampling.sampler import Sampler
from rlhf.sampling.shapes import Shape, Use, cheapest, planned
from rlhf.train import guard

N_CALLS = 200
HALF = jax.device_put(np.float32(0.5))  # a number that a computation made


@dataclasses.dataclass(frozen=True)
class Asked:
    token_ids: tuple[int, ...]
    row: int
    answer: None = None
    fields: dict = dataclasses.field(default_factory=dict)
    soft_tokens: tuple = ()
    pictures: tuple = ()


@pytest.fixture(scope="module")
def sampler():
    model = Gemma3(dataclasses.replace(SMALL, vocab_size=1024, layers=2))
    return Sampler(model, Tokenizer()), {"model": jax.device_put(model.initialise(0))}


def asked(rng, n):
    lengths = rng.integers(1, 33, n)
    return [Asked(tuple(rng.integers(300, 1000, length).tolist()), row) for row, length in enumerate(lengths)]


def settings(rng):
    """What a call may differ in: method, length, stops, bias, and what is reported."""
    methods = [
        Greedy(),
        Sample(temperature=float(rng.uniform(0.1, 2))),
        Sample(top_k=int(rng.integers(1, 200)), min_p=0.1),
        Sample(top_p=HALF, top_k=300),
        Sample(repetition_penalty=1.3, top_p=0.9),
    ]
    return {
        "method": methods[rng.integers(5)],
        "max_new_tokens": int(rng.integers(1, 17)),
        "n": int(rng.integers(1, 9)),
        "stop": ["end", "\n", "x"][: rng.integers(3)],
        "bias": {int(i): 1.5 for i in rng.integers(0, 1000, rng.integers(3))},
        "min_new_tokens": int(rng.integers(3)),
        "wants_entropy": bool(rng.integers(2)),
        "step": int(rng.integers(1000)),
        "seed": int(rng.integers(5)),
    }


def test_nothing_compiles_after_warm_up(sampler, caplog, monkeypatch):
    generate, params = sampler
    monkeypatch.setattr(side_by_side, "_cores", lambda: 2)
    with caplog.at_level(logging.INFO):
        generate.warm_up(params, Use(range(1, 33), n_prompts=4, n=8, max_new_tokens=16, slots=32))
    assert generate.shapes == [Shape(4, 8, 32, 16)]
    assert "generation for 2 × 2 prompts × 8 answers, ≤ 32 + 16 tokens: compiled in" in caplog.text
    assert "MB of keys and values" in caplog.text
    rng = np.random.default_rng(0)
    with guard.record_compilations() as recording:
        for _ in range(N_CALLS):
            generate(params, asked(rng, int(rng.integers(1, 8))), **settings(rng))
    assert not len(recording), str(recording)
    with guard.record_compilations() as recording, caplog.at_level(logging.WARNING):
        generate(params, asked(rng, 2), method=Greedy(), max_new_tokens=17)
    assert recording.names["decode"] == 1  # the count does count
    assert (
        "2 prompts, ≤ 32 + 24 tokens was not planned, so it is compiled for itself; planned: 4 prompts" in caplog.text
    )


def test_no_copy_of_the_layers_outlives_a_call(sampler):
    generate, params = sampler
    generate(params, asked(np.random.default_rng(0), 2), method=Greedy(), max_new_tokens=2)
    before = sum(x.nbytes for x in jax.live_arrays())
    generate(params, asked(np.random.default_rng(0), 2), method=Greedy(), max_new_tokens=2)
    assert sum(x.nbytes for x in jax.live_arrays()) == before


def test_shapes_follow_the_lengths_of_the_data():
    long_tailed = [20] * 990 + [400] * 10
    assert Use(long_tailed, n_prompts=8, n=8, max_new_tokens=64).shapes() == [
        Shape(8, 8, 512, 64),
        Shape(8, 8, 24, 64),  # nine of ten batches of eight have no long prompt
    ]
    often_long = [20] * 500 + [400] * 500
    assert Use(often_long, n_prompts=8, max_new_tokens=64).shapes() == [Shape(8, 1, 512, 64)]


def test_few_shapes_are_planned_and_the_cheapest_is_taken():
    rollouts, evaluation = Use([30], 8, 100, n=8), Use([30], 200, 100)
    shapes = planned([], [rollouts, evaluation])
    assert shapes == [Shape(8, 8, 32, 128), Shape(64, 1, 32, 128)]  # by groups, single prompts would take eight times
    assert planned(shapes, [Use([25], 60, 90), Use([30], 6, 100, n=8)]) == shapes
    assert cheapest(shapes, Shape(1, 1, 30, 100), 8, 8, 64) == shapes[0]
    assert cheapest(shapes, Shape(1, 1, 30, 100), 64, 1, 64) == shapes[1]
    assert cheapest(shapes, Shape(1, 1, 33, 100), 8, 8, 64) is None
    assert cheapest(shapes, Shape(1, 1, 30, 100), 8, 8, 32) is None  # more rows than there may be


def test_a_late_compilation_is_counted_and_may_be_an_error(caplog):
    watch, strict = guard.Watch(), guard.Watch(is_forbidden=True)
    step = jax.jit(lambda x: x * 3 + 1)
    for size in (2, 2):
        with watch.part("a step"):
            step(np.zeros(size))
    assert watch.n_late == 0
    with watch.part("an evaluation"):
        step(np.zeros(3))
    assert watch.n_late == 0  # the first of its kind
    with watch.part("a step"):
        step(np.zeros(4))
    assert watch.n_late == 1
    assert "a step, which had been done before, had 1 compilations" in caplog.text
    with strict.part("a step"):
        step(np.zeros(5))
    with (
        pytest.raises(TrainingError, match=r"a step, which had been done before.*hardware\.forbid_recompile=true"),
        strict.part("a step"),
    ):
        step(np.zeros(6))


def test_what_is_compiled_ahead_in_the_background_is_not_late():
    watch, step = guard.Watch(is_forbidden=True), jax.jit(lambda x: x * 5 - 1)
    for size in (2, 3):
        with watch.part("a step"):
            thread = threading.Thread(target=lambda n=size: step(np.zeros(n)), name=IN_BACKGROUND)
            thread.start()
            thread.join()
    assert watch.n_late == 0


def test_shapes_in_the_background_are_there_when_they_are_needed(sampler):
    generate = Sampler(sampler[0].model, sampler[0].tokenizer)
    uses = [Use([32], n_prompts=4, n=4, max_new_tokens=16), Use([60], n_prompts=16, max_new_tokens=4)]
    generate.warm_up(sampler[1], *uses, in_background=True)  # the first is there, of the tests above
    assert generate.shapes == [Shape(4, 4, 32, 16), Shape(16, 1, 64, 16)]
    rng = np.random.default_rng(0)
    with guard.record_compilations() as recording:
        rollout = generate(sampler[1], asked(rng, 12), method=Greedy(), max_new_tokens=4)
    assert len(rollout.texts) == 12
    assert recording.names["decode"] <= 1  # by the thread, for which the call waits
    assert all(one.is_ahead for one in recording.compilations if one.name in ("decode", "prefill", "seat"))
