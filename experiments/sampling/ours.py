"""This project: python ours.py rollout|group|queue tiny|270m [float32|bfloat16|int8] ROUNDS"""

import sys

import jax
import shape

from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.sampling.generate import generate
from rlhf.sampling.methods import Sample
from rlhf.sampling.shapes import shape_for
from rlhf.sampling.weights import DecodingWeights


def rollout(call, size, rounds):
    """A static batch: new tokens a second, the prefill included."""
    prompts = shape.prompts(size, shape.ROWS, shape.PROMPT)
    run = lambda: call(prompts, max_new_tokens=shape.NEW)  # noqa: E731
    run()
    shape.say("ready")
    shape.report(tokens_per_second=shape.ROWS * shape.NEW / shape.seconds(run, rounds))


def group(call, size, rounds):
    """Several samples a prompt, against the same rows as prompts of their own."""
    prompts = shape.prompts(size, shape.GROUPS, shape.LONG_PROMPT)
    apart = [prompt for prompt in prompts for _ in range(shape.SAMPLES)]
    together_run = lambda: call(prompts, n=shape.SAMPLES, max_new_tokens=shape.NEW)  # noqa: E731
    apart_run = lambda: call(apart, max_new_tokens=shape.NEW)  # noqa: E731
    together_run()
    shape.say("ready")
    apart_run()
    together, separate = shape.seconds(together_run, rounds), shape.seconds(apart_run, rounds)
    shape.report(group_seconds=together, separate_seconds=separate, ratio=separate / together)


def queue(call, size, rounds):
    """Answers of very different lengths through few slots, against batches that wait for their longest."""
    prompts, limits = shape.prompts(size, shape.QUEUE, shape.PROMPT), shape.lengths()
    settings = {"slots": shape.SLOTS}
    fixed = {"shape": shape_for(shape.SLOTS, 1, shape.PROMPT, max(limits))}  # the programs of the continuous one

    def continuous():
        call(prompts, max_new_tokens=limits, **settings)

    def static():
        for start in range(0, shape.QUEUE, shape.SLOTS):
            part = slice(start, start + shape.SLOTS)
            call(prompts[part], max_new_tokens=limits[part], rows=range(start, start + shape.SLOTS), **fixed)

    continuous()
    shape.say("ready")
    static()
    n, one, other = sum(limits), shape.seconds(continuous, rounds), shape.seconds(static, rounds)
    shape.report(continuous=n / one, static=n / other, ratio=other / one)


def main(case: str, name: str, kind: str, rounds: int) -> None:
    s = shape.SIZES[name]
    model = Gemma3(
        Architecture(
            vocab_size=s.vocab,
            width=s.width,
            ff_width=s.ff_width,
            layers=s.layers,
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_width=s.head_width,
            query_scale=s.head_width**-0.5,
            window=s.window,
            pattern=shape.PATTERN,
            rope_base_local=shape.ROPE_BASE_LOCAL,
            rope_base_global=shape.ROPE_BASE_GLOBAL,
        )
    )
    params = {"model": jax.device_put(model.initialise(0))}
    weights, key = DecodingWeights(model, None if kind == "float32" else kind), jax.random.key(0)
    method = Sample(temperature=shape.TEMPERATURE, top_k=shape.TOP_K)

    def call(prompts, **settings):
        return generate(model, params, prompts, method=method, key=key, stop_ids=(), weights=weights, **settings)

    {"rollout": rollout, "group": group, "queue": queue}[case](call, s, rounds)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
