"""How long the training step of 1B takes to trace, lower and compile, from abstract arrays, for several depths.

    .venv/bin/python experiments/memory/compile_time.py 26 18 62

Seconds of the clock, and of the processor (both cores together), which count where other programs run too.
"""

import argparse
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from rlhf.algorithms.sft import SFT
from rlhf.model.gemma3 import Architecture, Gemma3
from rlhf.train.processor import prepare_processor
from rlhf.train.update import eager_update, initial_optimizer

ONE_B = Architecture(262_144, 1152, 6912, 26, 4, 1, 256, 256**-0.5, 512)


def lowered(layers: int, time_: int) -> Any:
    model = Gemma3(dataclasses.replace(ONE_B, layers=layers))
    algorithm = jax.tree.map(jnp.float32, SFT(learning_rate=1e-5, batch_size=1, microbatch_size=1))
    params, shape = {"model": model.abstract()}, jax.ShapeDtypeStruct
    optimizer = jax.eval_shape(functools.partial(initial_optimizer, algorithm), params)
    counts = dict.fromkeys(("n_updates", "n_skipped"), shape((), "int32"))
    batch = {name: shape((1, time_), "int32") for name in ("tokens", "segments", "positions")}
    batch |= {"weight": shape((1, time_), "float32"), "is_answer": shape((1, time_), bool), "row": shape((1,), "int32")}
    run = jax.jit(functools.partial(eager_update, model=model), donate_argnums=0)
    return run.lower({"params": params, "optimizer": optimizer, **counts}, {}, batch, algorithm, jnp.int32(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layers", nargs="*", type=int, default=[26, 18, 62])
    parser.add_argument("--time", type=int, default=512, help="tokens of the row")
    given = parser.parse_args()
    prepare_processor()
    jnp.zeros(()).block_until_ready()
    print("| layers | seconds | processor seconds | instructions | working memory, GB |\n|---|---|---|---|---|")
    for layers in given.layers:
        clock, processor = time.perf_counter(), time.process_time()
        compiled = lowered(layers, given.time).compile()
        took, used = time.perf_counter() - clock, time.process_time() - processor
        n, temp = compiled.as_text().count(" = "), compiled.memory_analysis().temp_size_in_bytes / 1e9
        print(f"| {layers} | {took:.2f} | {used:.2f} | {n} | {temp:.2f} |", flush=True)


if __name__ == "__main__":
    main()
