"""Signals to stop are noted by a thread, and raise nothing; those that come together are one.

The programs are processes of their own, which send their signals to themselves, so that these fall where they should.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from ttt_e2e.cluster import signals
from ttt_e2e.errors import PreemptedError


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_signal_is_noted_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with signals.watch_for_preemption() as preemption:
        assert not preemption.poll()
        os.kill(os.getpid(), number)
        assert preemption.requested.wait(60)
        assert preemption.poll()
        # Ctrl-C stops a program, the others have it started again.
        kind = KeyboardInterrupt if number == signal.SIGINT else PreemptedError
        assert type(preemption.stopped("at step 3")) is kind
    assert signal.getsignal(number) == before


def test_what_the_process_was_started_to_ignore_it_ignores():
    """As a shell starts programs in the background: Ctrl-C is for the one in the foreground."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.watch_for_preemption() as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not preemption.requested.wait(0.1)
    finally:
        signal.signal(signal.SIGINT, before)


def outcome(program: str) -> tuple[int, str]:
    """Exit code and stderr of a program that sends itself signals."""
    begin = (
        "import gc, os, signal, sys, threading, time\nfrom ttt_e2e import cli\nfrom ttt_e2e.cluster import signals\n"
    )
    result = subprocess.run([sys.executable, "-c", begin + program], stderr=subprocess.PIPE, text=True, timeout=120)
    return result.returncode, result.stderr


STUB = """
from ttt_e2e.cluster.signals import watch_for_preemption
def send(*names):
    for name in names:
        os.kill(os.getpid(), signal.Signals[name])
        time.sleep(0.02)
def train(argv):
    with watch_for_preemption() as preemption:
        send(*FIRST)
        preemption.requested.wait()
        time.sleep(0.1)
        send(*WHILE_IT_SAVES)
        saved = preemption.stopped("step 3 is saved")
    raise saved
cli.COMMANDS["train"] = train
sys.argv = ["ttt-e2e", "train"]
code = cli.main()
send(*AT_ITS_END)
time.sleep(0.1)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "first, then, at_end, grace, code",
    (
        (("SIGTERM", "SIGUSR1"), (), (), 60, 75),
        (("SIGTERM",), ("SIGTERM", "SIGUSR1", "SIGINT"), (), 60, 75),
        (("SIGUSR1",), (), ("SIGTERM", "SIGUSR1"), 60, 75),
        (("SIGINT", "SIGINT"), ("SIGINT",), ("SIGINT",), 60, 130),
        (("SIGTERM",), ("SIGTERM",), (), 0, 128 + 15),  # after some seconds it means at once
        (("SIGINT",), ("SIGINT",), (), 0, 130),
        (("SIGTERM",), (), ("SIGTERM",), 0, 75),  # what is saved stays so
    ),
)
def test_signals_that_come_together_are_one(first, then, at_end, grace, code):
    settings = f"signals.GRACE_SECONDS = {grace}\nFIRST, WHILE_IT_SAVES, AT_ITS_END = {first}, {then}, {at_end}\n"
    assert outcome(settings + STUB)[0] == code


@pytest.mark.parametrize("name, code", (("SIGINT", 130), ("SIGTERM", 75), ("SIGUSR1", 75)))
def test_before_there_is_anything_to_save_a_signal_ends_the_program_at_once(name, code):
    program = f"""
def train(argv):
    os.kill(os.getpid(), signal.{name})
    time.sleep(60)
cli.COMMANDS["train"] = train
sys.argv = ["ttt-e2e", "train"]
sys.exit(cli.main())
"""
    assert outcome(program) == (code, "interrupted\n" if code == 130 else f"preempted by {name}\n")


@pytest.mark.parametrize("place", ("a callback of the garbage collector", "a finalizer", "a weak reference"))
def test_ctrl_c_where_python_cannot_raise_it_ends_other_commands_too(place):
    """Without `send_interrupts_again`, it is printed, and the command goes on: the control below."""
    program = f"""
def interrupt(*_):
    if not sent and threading.current_thread() is threading.main_thread():
        sent.append(True)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass  # where handlers are run
class Finalized:
    __del__ = interrupt
sent = []
def generate(argv):
    if {place!r} == "a finalizer":
        Finalized()
    elif {place!r} == "a weak reference":
        import weakref
        kept = set()
        reference = weakref.ref(kept, interrupt)
        del kept
    else:
        gc.callbacks.append(interrupt)
        gc.collect()
    time.sleep(2)
cli.COMMANDS["generate"] = generate
sys.argv = ["ttt-e2e", "generate"]
"""
    assert outcome(f"{program}sys.exit(cli.main())") == (130, "interrupted\n")
    if place == "a callback of the garbage collector":
        code, printed = outcome(f"{program}sys.exit(cli.main(sys.argv[1:]))")
        assert code == 0 and "KeyboardInterrupt" in printed


def test_a_second_signal_ends_the_process_though_its_main_thread_is_busy():
    program = """
import hashlib
from ttt_e2e.cluster import signals
signals.GRACE_SECONDS = 0.1
with signals.watch_for_preemption() as preemption:
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
