"""Peak memory and time of reading a checkpoint of the true shapes, written before with random numbers.

.venv/bin/python experiments/memory/checkpoint_load.py [--size 1b] [--form hf|orbax] [--layers N] [--folder DIR]
    [--quantise int8|nf4]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from rlhf.run import CONF


def architecture(size: str, layers: int | None):
    with initialize_config_dir(CONF, version_base="1.3"):
        model = compose("config", overrides=[f"model=gemma3_{size}"]).model
    if layers is not None:
        model.layers = layers
    return instantiate(model, _convert_="all").architecture()


def write(a, form: str, folder: Path) -> None:
    """A checkpoint in bfloat16; the arrays of a kind are equal but for their first number."""
    import ml_dtypes
    import numpy as np

    from rlhf.model.checkpoints import write_orbax, write_safetensors
    from rlhf.model.checkpoints.names import leaf_shapes, nested

    random = np.random.default_rng(0)

    def leaf(shape):
        one = (0.02 * random.standard_normal(shape[1:] or shape, np.float32)).astype(ml_dtypes.bfloat16)
        return np.broadcast_to(one, shape)

    tree = nested({path: leaf(shape) for path, shape in leaf_shapes(a).items()})
    tree["model"]["embedding"] = (0.02 * random.standard_normal((a.vocab_size, a.width), np.float32)).astype(
        ml_dtypes.bfloat16
    )
    if form == "orbax":
        write_orbax.write(tree, a, "bfloat16", folder)
    else:
        folder.mkdir()
        write_safetensors.write(tree, a, "bfloat16", folder, int(1e9))


def load(size: str, layers: int | None, folder: Path, quantise: str | None) -> dict:
    """What one process sees: bytes of the parameters, seconds, and its peak resident memory."""
    import jax

    from rlhf.model.checkpoints.stream import as_read
    from rlhf.model.quantised import quantiser
    from rlhf.train.sources import locate

    a = architecture(size, layers)
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    finish = as_read if quantise is None else quantiser(quantise)
    before = peak_bytes()
    start = time.perf_counter()
    tree = jax.block_until_ready(locate(str(folder)).load(a, "bfloat16", None, finish))
    seconds = time.perf_counter() - start
    n_bytes = sum(x.nbytes for x in jax.tree.leaves(tree))
    return {"parameters": n_bytes, "before": before, "peak": peak_bytes(), "seconds": seconds}


def peak_bytes() -> int:
    """Most memory that was resident at once in this process (`ru_maxrss` would count the parent's before its start)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1b")
    parser.add_argument("--form", default="hf", choices=["hf", "orbax"])
    parser.add_argument("--layers", type=int, help="fewer layers than the size has")
    parser.add_argument("--folder", type=Path, help="where to write it; kept")
    parser.add_argument("--quantise", choices=["int8", "nf4"], help="matrices of the layers as codes")
    parser.add_argument("--step", choices=["write", "load"], help="only this, in this process")
    options = parser.parse_args()
    if options.step == "write":
        write(architecture(options.size, options.layers), options.form, options.folder)
    elif options.step == "load":
        print(json.dumps(load(options.size, options.layers, options.folder, options.quantise)))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary) / "checkpoint"
            shape = ["--size", options.size, "--form", options.form]
            shape += [] if options.layers is None else ["--layers", str(options.layers)]
            shape += [] if options.quantise is None else ["--quantise", options.quantise]
            base = [sys.executable, __file__, *shape, "--folder", str(folder)]
            if not folder.exists():
                subprocess.run([*base, "--step", "write"], check=True)
            done = subprocess.run([*base, "--step", "load"], check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        beyond = found["peak"] - found["parameters"]
        print(
            f"{options.size} {options.form} {options.quantise or ''}: "
            f"parameters {found['parameters'] / 1e9:.2f} GB, peak "
            f"{found['peak'] / 1e9:.2f} GB ({beyond / 1e9:.2f} GB more, of which {found['before'] / 1e9:.2f} GB before "
            f"loading), {found['seconds']:.1f} s"
        )


if __name__ == "__main__":
    main()
