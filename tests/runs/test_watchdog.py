"""What a step's time went into is said once, while it goes on and afterwards."""

import logging
import time

import numpy as np
import pytest

from ttt_e2e.runs import watchdog
from ttt_e2e.runs.watchdog import PHASES, Phases, Watchdog, describe, seconds_alone, seconds_of_step


class Clock:
    """Stands in for the module `time`: it goes on when it is told to."""

    def __init__(self):
        self.seconds = 100.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


@pytest.fixture
def said(caplog):
    """The lines that the watchdog has logged."""
    caplog.set_level(logging.WARNING, logger="ttt_e2e.runs.watchdog")
    return lambda: [record.getMessage() for record in caplog.records]


def wait_for(condition) -> None:
    """Another thread's doing; fails where it is not done within a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def step(**seconds) -> np.ndarray:
    """Seconds of one process in each phase [1, F]."""
    return np.array([[seconds.get(phase, 0.0) for phase in PHASES]])


def test_every_second_is_spent_in_one_phase(clock):
    phases = Phases()
    clock.seconds += 1
    with phases.during("input"):
        clock.seconds += 2
    clock.seconds += 4
    with phases.during("evaluate"):
        clock.seconds += 8
        with phases.during("save"):
            clock.seconds += 16
        clock.seconds += 32
    assert dict(zip(PHASES, phases.take())) == {"input": 2, "compute": 5, "save": 16, "evaluate": 40}
    clock.seconds += 64
    with phases.during("save"):
        clock.seconds += 1
        assert phases.now == ("save", 164 + 63)
    assert dict(zip(PHASES, phases.take())) == {"input": 0, "compute": 64, "save": 1, "evaluate": 0}


def test_a_phase_ends_where_its_block_raises(clock):
    phases = Phases()
    with pytest.raises(KeyError), phases.during("save"):
        raise KeyError
    assert phases.now[0] == "compute"


def test_evaluation_is_no_part_of_a_step_and_waiting_for_devices_is_not_what_a_process_does_alone():
    seconds_F = np.array([1.0, 2.0, 4.0, 8.0])
    assert seconds_of_step(seconds_F) == 7
    assert seconds_alone(np.stack([seconds_F, 2 * seconds_F])).tolist() == [5, 10]


def test_a_slow_step_is_said_afterwards_and_its_echo_in_the_next_one_is_not(clock, said):
    dog = Watchdog(Phases(), factor=3, min_seconds=0, interval=1000)
    for number in range(1, 10):
        dog.step_done(number, step(compute=1.0))
    dog.step_done(10, step(compute=2.9))
    assert not said()
    dog.step_done(11, np.concatenate([step(compute=1.0), step(compute=1.0, input=6.0)]))
    dog.step_done(12, np.concatenate([step(compute=7.0), step(compute=1.0)]))
    dog.step_done(13, step(compute=1.0))
    dog.close()
    assert said() == [
        "step 11 took 7.0 seconds, the median is 1.00: "
        "process 1 input 6.0, compute 1.0, save 0.0; process 0 input 0.0, compute 1.0, save 0.0"
    ]


def test_of_many_processes_those_are_named_that_did_most_alone():
    seconds_PF = np.tile(step(compute=5.0), (500, 1))
    seconds_PF[321] = step(save=5.0)
    text = describe(seconds_PF)
    assert text.startswith("process 321 input 0.0, compute 0.0, save 5.0; process 0 ")
    assert text.endswith("; process 6 input 0.0, compute 5.0, save 0.0; 492 more")


@pytest.mark.parametrize(("factor", "min_seconds"), ((0, 0), (3, 1000)))
def test_nothing_is_slow_where_nothing_is_watched_or_all_is_short(factor, min_seconds, clock, said):
    dog = Watchdog(Phases(), factor, min_seconds, interval=1000)
    for number, seconds in enumerate([1.0] * 10 + [900.0]):
        dog.step_done(number, step(compute=seconds))
    dog.close()
    assert not said()


def test_a_step_that_does_not_end_is_said_while_it_lasts_and_again_when_twice_as_long(clock, said):
    phases = Phases()
    dog = Watchdog(phases, factor=3, min_seconds=0, interval=0.001)
    for number in range(1, 7):
        clock.seconds += 1
        dog.step_done(number, step(compute=1.0))
    clock.seconds += 1
    with phases.during("input"):
        clock.seconds += 2.5
        wait_for(lambda: len(said()) == 1)
        clock.seconds += 3.6
        wait_for(lambda: len(said()) == 2)
    dog.step_done(7, step(compute=1.0, input=6.1))
    with phases.during("evaluate"):
        clock.seconds += 1000
    dog.restart()
    dog.close()
    begin = "step 6 was {} seconds ago, the median is 1.00: process 0 has been in input for {} seconds"
    assert said()[:2] == [begin.format(4, 2), begin.format(7, 6)]
    assert len(said()) == 3 and "step 7 took 7.1 seconds" in said()[2]


def test_the_first_steps_which_compile_are_not_slow(clock, said):
    dog = Watchdog(Phases(), factor=3, min_seconds=0, interval=1000)
    for number, seconds in enumerate([100.0, 1.0, 1.0, 90.0]):
        dog.step_done(number, step(compute=seconds))
    dog.close()
    assert not said()
