"""Long work shows a bar on a terminal, and plain lines in a log file."""

import io
import logging
import re
import types

import pytest

from ttt_e2e import progress
from ttt_e2e.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(progress, "time", clock)
    return clock


def work(clock, steps: int, seconds: float, **options) -> None:
    for _ in progress_bar(range(steps), desc="work", unit="part", **options):
        clock.now += seconds


@pytest.mark.parametrize("is_terminal", (False, True))
def test_only_a_terminal_gets_control_characters(is_terminal, clock, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", stream)
    work(clock, 3, 1.0)
    with progress_bar(total=4, desc="more", unit="token", unit_scale=True, leave=False) as bar:
        bar.set_postfix_str("cell 1", refresh=False)
        bar.update(2)
    assert ("\r" in stream.getvalue()) == is_terminal == bool(stream.getvalue())


@pytest.fixture
def lines(caplog):
    """What is logged where stderr is a file, as in a test it is."""
    caplog.set_level(logging.INFO, logger="ttt_e2e")
    return lambda: [record.getMessage() for record in caplog.records]


def test_short_work_has_no_line_and_long_work_few(lines, clock):
    work(clock, 4, 1.0)
    assert lines() == []
    work(clock, 100, 1.0)
    done = [int(re.match(r"work: (\d+) of 100, ", line)[1]) for line in lines()]
    assert done == [5, 35, 65, 95, 100]  # after 5 seconds, every 30, and at the end
    assert lines()[1] == "work: 35 of 100,  1.00part/s, 00:35 gone, 01:05 left"


def test_a_line_says_what_is_known(lines, clock):
    with progress_bar(desc="tokenizing", unit="document") as bar:
        clock.now += 10
        bar.set_postfix_str("file a")
        bar.update(20)
    assert lines() == ["tokenizing: 20,  2.00document/s, 00:10 gone, file a"]


def test_a_bar_that_is_switched_off_says_nothing(lines, clock):
    work(clock, 100, 1.0, disable=True)
    assert lines() == []
