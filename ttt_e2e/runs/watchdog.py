"""Measures how long a process spends in each phase of a step, and reports steps that take unusually long.

Shapes: `P` processes, `F` phases.
"""

import logging
import statistics
import threading
import time
from collections import deque
from contextlib import contextmanager

import jax
import numpy as np

# What the host does. "compute" is all the rest: starting steps, and waiting for the devices and so for other processes.
PHASES = ("input", "compute", "save", "evaluate")
MEDIAN_OF = 100  # the last steps, of which the median is taken
MIN_STEPS = 5  # steps before the median counts
MIN_SECONDS = 10.0  # shorter steps never count as slow: small models save for longer than they compute
MAX_NAMED = 8  # processes that a line names

logger = logging.getLogger(__name__)


class Phases:
    """Seconds that this process spends in each of the `PHASES`. Only the training loop's thread changes it."""

    def __init__(self):
        self.now = "compute", time.perf_counter()  # (phase, time of its beginning); other threads read it
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def during(self, phase: str):
        """Counts the time of a `with` block to a phase."""
        before, _ = self.now
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def take(self) -> list[float]:
        """Seconds in each phase [F] since the last call."""
        self._enter(self.now[0])
        seconds = list(self._seconds.values())
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return seconds

    def _enter(self, phase: str) -> None:
        """Ends the present phase, adding its seconds, and begins another one."""
        (before, since), now = self.now, time.perf_counter()
        self._seconds[before] += now - since
        self.now = phase, now


class Watchdog:
    """Logs steps that take more than `factor` times the median step, both during and after the step.

    During the step, a thread of every process logs that process's phase: a step that hangs in one process hangs in all,
    and then they cannot communicate. After the step, process 0 logs the seconds of every process in each phase.
    """

    def __init__(self, phases: Phases, factor: float, min_seconds: float = MIN_SECONDS, interval: float = 1.0):
        """`factor` 0 turns it off; `interval` is the time from one check to the next, in seconds."""
        self._phases, self._factor, self._min_seconds, self._interval = phases, factor, min_seconds, interval
        self._durations: deque[float] = deque(maxlen=MEDIAN_OF)
        self._step, self._begin, self._last_was_slow = 0, time.perf_counter(), False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if factor:
            self._thread.start()

    def step_done(self, step: int, seconds_PF: np.ndarray) -> None:
        """Ends a step, in which processes spent these seconds in each phase [P, F]; logs it if it was slow."""
        self._step, self._begin = step, time.perf_counter()
        duration_P = seconds_of_step(seconds_PF)
        limit = self._limit()
        self._durations.append(float(duration_P[jax.process_index()]))
        # A delay of one process in a step delays the others in the next step, too: it is logged once.
        is_slow = self._factor > 0 and duration_P.max() > limit and not self._last_was_slow
        if is_slow and jax.process_index() == 0:
            logger.warning(
                "step %d took %.1f seconds, the median is %.2f: %s",
                step,
                duration_P.max(),
                statistics.median(self._durations),
                describe(seconds_PF),
            )
        self._last_was_slow = is_slow

    def restart(self) -> None:
        """Starts the clock of the next step anew: the time since the last step does not count."""
        self._begin = time.perf_counter()

    def close(self) -> None:
        """Ends the watching thread."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _limit(self) -> float:
        """Seconds beyond which a step counts as slow; infinite until there are enough steps for a median."""
        if len(self._durations) < MIN_STEPS:
            return float("inf")
        return max(self._factor * statistics.median(self._durations), self._min_seconds)

    def _watch(self) -> None:
        """Logs this process's phase while a step is slow, until the watchdog is closed."""
        reported, limit = None, 0.0  # beginning of the step that was reported last
        while not self._closed.wait(self._interval):
            begin, (phase, since), now = self._begin, self._phases.now, time.perf_counter()
            if reported != begin:
                limit = self._limit()
            if phase == "evaluate" or now - begin <= limit:
                continue
            logger.warning(
                "step %d was %.0f seconds ago, the median is %.2f: process %d has been in %s for %.0f seconds",
                self._step,
                now - begin,
                statistics.median(self._durations),
                jax.process_index(),
                phase,
                now - since,
            )
            reported, limit = begin, 2 * (now - begin)  # the next report is after twice this time


def seconds_in(seconds_F: np.ndarray, *phases: str) -> np.ndarray:
    """Sum of the seconds in some phases, given those in each phase [..., F]."""
    return sum(seconds_F[..., PHASES.index(phase)] for phase in phases)


def seconds_of_step(seconds_F: np.ndarray) -> np.ndarray:
    """Duration of a step without evaluation, given the seconds in each phase [..., F]."""
    return seconds_in(seconds_F, "input", "compute", "save")


def seconds_alone(seconds_F: np.ndarray) -> np.ndarray:
    """Seconds in which a process does not wait for devices (`input` and `save`), given those in each phase [..., F]."""
    return seconds_in(seconds_F, "input", "save")


def describe(seconds_PF: np.ndarray) -> str:
    """A text with the seconds of each process in each phase, longest `seconds_alone` first; of many, only the first."""
    order = np.argsort(-seconds_alone(seconds_PF), kind="stable")
    parts = [
        f"process {process} "
        + ", ".join(
            f"{phase} {seconds:.1f}" for phase, seconds in zip(PHASES, seconds_PF[process]) if phase != "evaluate"
        )
        for process in order[:MAX_NAMED]
    ]
    rest = len(order) - len(parts)
    return "; ".join(parts) + (f"; {rest} more" if rest else "")
