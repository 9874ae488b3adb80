"""What is slow to import is not on the way from the start of a process to its first step."""

import subprocess
import sys

PROGRAM = """
import sys
import rlhf.train.checkpoint, rlhf.train.guard, rlhf.train.metrics, rlhf.train.signals

slow = {"orbax", "tensorboardX", "tensorstore", "tqdm", "flax", "datasets"} & set(sys.modules)
assert not slow, slow
thread = rlhf.train.checkpoint.import_in_background()
thread.join()
assert "orbax.checkpoint" in sys.modules
print("ok")
"""


def test_heavy_libraries_are_imported_when_they_are_needed():
    assert subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout == "ok\n"
