"""The meeting of all processes before JAX starts: who does not come is named to all that do."""

import socket
import threading

import pytest

from ttt_e2e.cluster import meeting
from ttt_e2e.errors import UserError


def meet(ids, count=3, timeout=3.0) -> dict[int, str]:
    """What each of the processes that come is told; "" where all have come."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    told = {}

    def come(place, number):
        try:
            meeting.meet(address, count, number, timeout)
            told[place] = ""
        except UserError as error:
            told[place] = str(error)

    threads = [threading.Thread(target=come, args=item) for item in enumerate(ids)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_all_come():
    assert meet((2, 0, 1), timeout=60) == {0: "", 1: "", 2: ""}


def test_who_does_not_come_is_named_to_all_that_do():
    missing = "process 2, 3 of 4 did not come within 3.0 seconds"
    assert meet((1, 0), count=4) == {0: missing, 1: missing}


def test_process_0_that_does_not_come_is_named():
    assert all("process 0 at 127.0.0.1" in message for message in meet((1, 2)).values())


def test_a_number_given_twice_is_told_to_all():
    told = meet((0, 1, 1), timeout=60)
    assert set(told.values()) == {"two processes have the number 1: each needs its own"}


def test_a_number_past_the_last_is_told_to_all():
    assert set(meet((0, 3), timeout=60).values()) == {"process 3 of 3: numbers are 0 to 2"}


def test_a_host_that_no_host_can_be_called_is_one_line():
    with pytest.raises(UserError, match=r"process 0 at a{70}:9 did not answer within 0.3 seconds"):
        meeting.meet("a" * 70 + ":9", 2, 1, 0.3)
