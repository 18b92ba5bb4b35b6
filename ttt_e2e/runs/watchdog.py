"""What a process is doing, for how long, and whether a step takes longer than steps do."""

import logging
import statistics
import threading
import time
from collections import deque
from contextlib import contextmanager

import jax
import numpy as np

# Of the host. "compute" is the rest: it starts steps, and waits for the devices, and so for every other process.
PHASES = ("input", "compute", "save", "evaluate")
MEDIAN_OF = 100  # steps
MIN_STEPS = 5  # before there is a median to speak of
MIN_SECONDS = 10.0  # no shorter step is slow: small models save and write for longer than they compute
MAX_NAMED = 8  # processes in a line

logger = logging.getLogger(__name__)


class Phases:
    """Seconds that this process spends in each of the `PHASES`. Only the training loop's thread changes it."""

    def __init__(self):
        self.now = "compute", time.perf_counter()  # the phase, and since when; other threads read it
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def during(self, phase: str):
        """Spends the time of a `with` block in a phase."""
        before, _ = self.now
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def take(self) -> list[float]:
        """Seconds in each phase since this was last called."""
        self._enter(self.now[0])
        seconds = list(self._seconds.values())
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return seconds

    def _enter(self, phase: str) -> None:
        (before, since), now = self.now, time.perf_counter()
        self._seconds[before] += now - since
        self.now = phase, now


class Watchdog:
    """Says in a line when a step takes more than `factor` times the median of steps, while it does and afterwards.

    While it does, every process says what it is in, since a step that hangs in one hangs in all, and they can no longer
    ask one another. Afterwards, process 0 says what each process spent its time on.
    """

    def __init__(self, phases: Phases, factor: float, min_seconds: float = MIN_SECONDS, interval: float = 1.0):
        """`factor` 0 watches nothing; `interval` is how often to look, in seconds."""
        self._phases, self._factor, self._min_seconds, self._interval = phases, factor, min_seconds, interval
        self._durations: deque[float] = deque(maxlen=MEDIAN_OF)
        self._step, self._begin, self._said_last = 0, time.perf_counter(), False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if factor:
            self._thread.start()

    def step_done(self, step: int, seconds_PF: np.ndarray) -> None:
        """Notes how long processes spent in each phase [P, len(PHASES)] for a step."""
        self._step, self._begin = step, time.perf_counter()
        duration_P = seconds_of_step(seconds_PF)
        limit = self._limit()
        self._durations.append(float(duration_P[jax.process_index()]))
        # What one process waits for in a step, the others wait for in the next: it is said once.
        is_slow = self._factor > 0 and duration_P.max() > limit and not self._said_last
        if is_slow and jax.process_index() == 0:
            logger.warning(
                "step %d took %.1f seconds, the median is %.2f: %s",
                step,
                duration_P.max(),
                statistics.median(self._durations),
                describe(seconds_PF),
            )
        self._said_last = is_slow

    def restart(self) -> None:
        """Leaves what has happened since the last step out of the next one's time."""
        self._begin = time.perf_counter()

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _limit(self) -> float:
        if len(self._durations) < MIN_STEPS:
            return float("inf")
        return max(self._factor * statistics.median(self._durations), self._min_seconds)

    def _watch(self) -> None:
        said_of, limit = None, 0.0
        while not self._closed.wait(self._interval):
            begin, (phase, since), now = self._begin, self._phases.now, time.perf_counter()
            if said_of != begin:
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
            said_of, limit = begin, 2 * (now - begin)  # then again when it has taken twice as long


def seconds_in(seconds_F: np.ndarray, *phases: str) -> np.ndarray:
    """Of seconds in each phase [..., F], those in some of them together."""
    return sum(seconds_F[..., PHASES.index(phase)] for phase in phases)


def seconds_of_step(seconds_F: np.ndarray) -> np.ndarray:
    """Of seconds in each phase [..., F], those of the step itself: all but evaluation."""
    return seconds_in(seconds_F, "input", "compute", "save")


def seconds_alone(seconds_F: np.ndarray) -> np.ndarray:
    """Of seconds in each phase [..., F], those in which a process does not wait for devices."""
    return seconds_in(seconds_F, "input", "save")


def describe(seconds_PF: np.ndarray) -> str:
    """What each process spent its time on; of many, those that did most by themselves."""
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
