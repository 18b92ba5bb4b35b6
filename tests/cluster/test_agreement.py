"""Signals to stop are noted by a thread; failures and requests of one process are those of all."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ttt_e2e.cluster import agreement


def test_a_signal_is_noted_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGUSR1)
    with agreement.watch_for_preemption() as preemption:
        assert not preemption.poll()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.requested.wait(60)
        assert preemption.poll()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_signal_ends_the_process_though_its_main_thread_is_busy():
    program = """
import hashlib
from ttt_e2e.cluster.agreement import watch_for_preemption
with watch_for_preemption() as preemption:
    print("ready", flush=True)
    preemption.requested.wait()
    print("noted", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # for ages, as in JAX: without the interpreter, blind to signals
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noted\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


def test_a_failure_anywhere_is_one_of_all(monkeypatch):
    asked = []
    monkeypatch.setattr(agreement, "any_process", lambda mine: asked.append(mine) or True)
    with pytest.raises(KeyError, match="mine"), agreement.fail_together(KeyError, "elsewhere"):
        raise KeyError("mine")
    with pytest.raises(KeyError, match="elsewhere"), agreement.fail_together(KeyError, "elsewhere"):
        pass
    # Any other exception is this process's own: the others are not asked.
    with pytest.raises(ValueError), agreement.fail_together(KeyError, "elsewhere"):
        raise ValueError
    assert asked == [True, False]
