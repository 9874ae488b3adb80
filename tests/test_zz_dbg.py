import traceback
from conftest import *
def test_x(command, small):
    try:
        done = command(*small, "algorithm.learning_rate=1e-2", "evaluation.rows=0", "hydra.run.dir=base")
        open("/tmp/reliability/dbg.txt","w").write(done.output)
        assert done.code == 0
    except BaseException:
        open("/tmp/reliability/dbg.txt","a").write(traceback.format_exc()); raise
