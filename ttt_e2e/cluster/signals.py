"""Signals that ask a run to stop: a thread notes them, and the run acts on them between two steps.

No handler raises an exception. That would come up wherever Python happens to be: within a save, or in a callback of the
garbage collector (JAX has one), where Python prints it and goes on. This module does not import JAX, which takes long:
`ttt-e2e` watches from its first line on.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager

from ttt_e2e.errors import EXIT_REQUEUE, PreemptedError

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SIGUSR1: Slurm's, ahead of a job's time limit
# Signals that follow the first so soon say the same: schedulers send two at once, and `timeout` sends each one twice.
GRACE_SECONDS = 5.0


class Preemption:
    """Whether this process was asked to stop (`requested`), and whether any process was (`poll`)."""

    def __init__(self, working: bool):
        self.requested = threading.Event()
        self._first: int | None = None  # number of the first signal
        self._since = 0.0
        self.end = lambda: None  # of what `_begin` began
        self._working = working  # inside `watch_for_preemption`: the run stops by itself

    def poll(self) -> bool:
        """Whether any process was asked to stop. Every process must call it; it waits for all."""
        from ttt_e2e.cluster.agreement import any_process

        return any_process(self.requested.is_set())

    def stopped(self, where: str) -> BaseException:
        """The exception that ends a run after `poll`: `PreemptedError`, or `KeyboardInterrupt` after Ctrl-C here."""
        if self._first == signal.SIGINT:
            return KeyboardInterrupt(f"interrupted: {where}")
        return PreemptedError(f"preempted: {where}")

    @contextmanager
    def working(self):
        """Within the `with` block, the run stops by itself; before, a signal ends the process at once."""
        self._working = True
        try:
            yield self
        finally:
            self._working = False

    def note(self, number: int) -> None:
        """Notes a signal. Ends the process if there is nothing to save, or a signal some seconds before was in vain."""
        name, is_first = signal.Signals(number).name, not self.requested.is_set()
        if is_first:
            self._first, self._since = number, time.monotonic()
        code = 130 if self._first == signal.SIGINT else EXIT_REQUEUE
        if is_first and not self._working:
            _exit("interrupted" if code == 130 else f"preempted by {name}", code)
        elif is_first:
            self.requested.set()
            logger.warning(
                "%s: saving, then stopping; another signal after %g seconds stops at once", name, GRACE_SECONDS
            )
        elif time.monotonic() - self._since > GRACE_SECONDS:
            _exit(f"{name}: stopped at once", 128 + number if self._working else code)


_of_the_program: Preemption | None = None  # as of `watch_program`


def watch_program() -> None:
    """Watches for signals from now to the end of the process, past the end of a run: its exit code is then known.

    Until `watch_for_preemption`, and after it, a signal ends the process at once, with code 130 or `EXIT_REQUEUE`.
    """
    global _of_the_program
    _of_the_program = Preemption(working=False)
    _of_the_program.end = _begin(_of_the_program)  # kept: the sockets would be closed with it


@contextmanager
def watch_for_preemption():
    """Yields a `Preemption` that SIGTERM, SIGUSR1 or SIGINT sets.

    Signals of the next `GRACE_SECONDS` are ignored; one after that exits at once, with code 128 + signal.

    A thread reads the signals' numbers, because Python's own handlers do not run while JAX keeps the main thread busy.
    In another thread than the main one, where Python allows no signal handlers, nothing is watched; nor are signals
    that the process was started to ignore.
    """
    if _of_the_program:
        with _of_the_program.working() as preemption:
            yield preemption
        return
    preemption = Preemption(working=True)
    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return
    preemption.end = _begin(preemption)
    try:
        yield preemption
    finally:
        preemption.end()


def send_interrupts_again() -> None:
    """Has an interrupt that Python cannot raise, in a callback of the garbage collector, say, raised a moment later."""

    def hook(unraisable):
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)
            return
        again = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


def _begin(preemption: Preemption):
    """Starts to watch; returns a function that ends it, and restores the handlers."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(reader, preemption), daemon=True)
    watched = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in watched}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher.start()

    def end():
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        writer.close()
        watcher.join()
        reader.close()

    return end


def _watch(reader: socket.socket, preemption: Preemption) -> None:
    """Notes every signal; returns when the other end is closed."""
    while received := reader.recv(1):
        if received[0] in STOP_SIGNALS:
            preemption.note(received[0])


def _exit(message: str, code: int) -> None:
    """Prints a line and ends the process at once."""
    print(message, file=sys.stderr, flush=True)
    os._exit(code)
