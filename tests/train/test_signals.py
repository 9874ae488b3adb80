"""The first signal is a request, the second ends the process, and the handlers of before come back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from rlhf.train.signals import StopSignals

PROGRAM = """
import logging, signal, sys, time
# a test run in the background of a script inherits that SIGINT is ignored, which the program would respect
signal.signal(signal.SIGINT, signal.default_int_handler)
logging.basicConfig(level=logging.INFO, format="%(message)s")
from rlhf.train.signals import StopSignals
with StopSignals() as signals:
    {body}
print("end of the program")
"""
LOOP = """print("ready", flush=True)
    while not signals.received:
        time.sleep(0.005)
    print("saved", flush=True)
    signals.leave("stopped after step 3; go on with resume=here")"""
# The main thread is inside one compiled call, where Python handles no signal.
STUCK = """import jax
    spin = jax.jit(lambda x: jax.lax.while_loop(lambda x: x >= 0, lambda x: (x + 1) % 7, x)).lower(0).compile()
    print("ready", flush=True)
    jax.block_until_ready(spin(0))"""


def run(body: str, *signals: int) -> tuple[int, str, str]:
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            for number in signals:
                process.send_signal(number)
                if number is not signals[-1]:
                    assert "once more ends at once" in process.stderr.readline()
            out, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, out, errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_lets_the_loop_save_and_leave(number, code):
    returned, out, errors = run(LOOP, number)
    assert (returned, out) == (code, "saved\n")
    name = signal.Signals(number).name
    assert f"{name}: stopping after this step; once more ends at once" in errors
    assert f"{name}: stopped after step 3; go on with resume=here" in errors
    assert "Traceback" not in errors


def test_the_second_signal_ends_the_process_even_inside_a_compiled_function():
    returned, out, _ = run(STUCK, signal.SIGTERM, signal.SIGINT)
    assert (returned, out) == (130, "")


def test_handlers_come_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    n_threads = threading.active_count()
    with StopSignals() as signals:
        assert signals.received is None
        assert signals.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(SystemExit) as leaving:
            signals.leave("x")
        assert leaving.value.code == 143
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == n_threads


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_happens():
    seen = []

    def body():
        with StopSignals() as signals:
            seen.append(signals.received)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [None]
