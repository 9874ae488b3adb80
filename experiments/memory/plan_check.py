"""The peak that `rlhf task=plan` predicts, against what a process really takes, on this machine's CPU.

Each configuration runs in a process of its own: the update is compiled, then the memory that is resident is noted, then
the arrays are made and two optimizer steps run. The peak is the most that was resident, less what was noted.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL = ("model.vocab_size=16384", "model.width=512", "model.ff_width=2048", "model.layers=8", "model.head_width=128")
CONFIGS = {
    "SFT": ("algorithm=sft", "dataset.max_length=256"),
    "SFT, remat=block": ("algorithm=sft", "dataset.max_length=512", "hardware.remat=block"),
    "SFT, microbatches": ("algorithm=sft", "dataset.max_length=256", "algorithm.microbatch_size=2"),
    "DPO": ("algorithm=dpo", "dataset.max_length=128"),
    "GRPO, LoRA": (
        *("algorithm=grpo", "reward=length", "model.lora.rank=8", "dataset.max_length=128"),
        *("algorithm.batch_size=4", "algorithm.group_size=4", "algorithm.microbatch_size=16"),
        "algorithm.max_new_tokens=128",
    ),
}


def resident(field: str) -> int:
    """Bytes of this process: VmRSS (now) or VmHWM (the most so far)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


def compare(words: list[str]) -> dict[str, float]:
    """Predicted and measured peak of one configuration, in bytes."""
    import jax
    import jax.numpy as jnp
    from hydra import compose, initialize_config_dir

    from rlhf.run import CONF
    from rlhf.sections import settings
    from rlhf.tasks.plan import PROCESS, Plan
    from rlhf.train.processor import prepare_processor
    from rlhf.train.update import initial_state, update

    prepare_processor(keep_memory=False)
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", overrides=["hardware=cpu", "hardware.compilation_cache=null", *words])
    s = settings(cfg)
    setup = Plan().setup(s, None)
    need = Plan().need(s, setup)
    predicted = need.update_peak - need.parts[PROCESS]

    def ones(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), tree)

    algorithm = jax.tree.map(lambda x: jnp.float32(x) if isinstance(x, int | float) else x, setup.algorithm)
    state = jax.eval_shape(lambda p: initial_shapes(p, algorithm), setup.trainable)
    compiled = update.lower(
        state, setup.frozen, setup.batch, algorithm, jnp.int32(2), model=setup.model, mesh=None
    ).compile()
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts anew
    frozen, reference, batch = ones(setup.frozen), ones(setup.reference), ones(setup.batch)
    live = initial_state(ones(setup.trainable), algorithm)
    for _ in range(2):
        live, metrics = compiled(live, frozen, batch, algorithm, jnp.int32(2))
        jax.block_until_ready((live, metrics))
    del reference
    return {"predicted": float(predicted), "measured": float(resident("VmHWM") - before)}


def initial_shapes(params: Any, algorithm: Any) -> dict[str, Any]:
    """What `initial_state` gives, for `jax.eval_shape`."""
    import jax.numpy as jnp

    from rlhf.train.update import initial_optimizer

    optimizer = initial_optimizer(algorithm, params)
    return {"params": params, "optimizer": optimizer, "n_updates": jnp.int32(0), "n_skipped": jnp.int32(0)}


def run_apart(words: tuple[str, ...]) -> dict[str, float]:
    """`compare` in a process of its own."""
    common = (*MODEL, "algorithm.batch_size=8", "algorithm.microbatch_size=8")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # that a run begins with
    command = [sys.executable, __file__, "--words", *common, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", nargs="+", help="overrides of one configuration, measured in this process")
    given = parser.parse_args()
    if given.words:
        print(json.dumps(compare(given.words)))
        return
    print("| configuration | predicted, GB | measured, GB | predicted ÷ measured |\n|---|---|---|---|")
    for name, words in CONFIGS.items():
        found = run_apart(words)
        share = found["predicted"] / found["measured"]
        print(f"| {name} | {found['predicted'] / 1e9:.3f} | {found['measured'] / 1e9:.3f} | {share:.3f} |", flush=True)


if __name__ == "__main__":
    main()
