"""Who a process is among others, by flags or environment; and the meeting of them all before JAX starts."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from ttt_e2e.cluster import distributed
from ttt_e2e.cluster.distributed import Processes
from ttt_e2e.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "gpu[07-10]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}


def test_slurm():
    assert distributed._from_slurm(SLURM) == Processes("gpu07:61444", 4, 2, 1)
    assert distributed._from_slurm(SLURM | {"SLURM_STEP_NUM_NODES": "1"}).per_node == 4


@pytest.mark.parametrize(
    "nodes, first",
    (("a1", "a1"), ("a1,b2", "a1"), ("a[1,7-9],b", "a1"), ("a-b[007-9]", "a-b007"), ("x-1.site,y", "x-1.site")),
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert distributed._from_slurm(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{first}:61444"


@pytest.mark.parametrize("without", ("SLURM_STEP_NODELIST", "SLURM_NTASKS"))
def test_a_batch_script_or_one_task_is_no_run_of_many(without):
    assert distributed._from_slurm({k: v for k, v in SLURM.items() if k != without}) is None


def test_open_mpi():
    assert distributed._from_open_mpi(OPEN_MPI) == Processes(f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}", 4, 3, 2)
    with pytest.raises(UserError, match="give --coordinator=HOST:PORT"):
        distributed._from_open_mpi(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""})


def test_skypilot():
    assert distributed._from_skypilot(SKYPILOT) == Processes("10.0.0.1:8476", 2, 1, 1)
    assert distributed._from_skypilot(SKYPILOT | {"JAX_COORDINATOR_PORT": "99"}).coordinator == "10.0.0.1:99"
    assert distributed._from_skypilot({"SKYPILOT_NUM_NODES": "1"}) is None


@pytest.mark.parametrize(
    "flags, message",
    (
        (("host:1", 0, -1), "--coordinator is given, but --num_processes is not"),
        (("", 0, 0), "--process_id is given, but --coordinator is not"),
        (("host", 2, 0), "--coordinator=host: it takes HOST:PORT"),
        (("host:1x", 2, 0), "it takes HOST:PORT"),
        (("host:1", 2, 2), "--process_id=2: legal: 0 to --num_processes - 1 = 1"),
    ),
)
def test_flags_that_do_not_fit_are_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(*flags)


def test_alone_it_opens_no_connection(monkeypatch):
    for name in [*SLURM, *OPEN_MPI, *SKYPILOT]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", None)
    assert distributed.initialize()
    assert distributed.initialize("host:1", 1, 0)


# ---------------------------------------------------------------------------------------------------------- the meeting


def meet(ids, count=3, timeout=3.0) -> dict[int, str]:
    """What each of the processes that come is told; "" where all have come."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    told = {}

    def come(place, number):
        try:
            distributed._meet(Processes(address, count, number, 1), timeout)
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


# ------------------------------------------------------------------------------------------------------------- signals


def test_a_signal_is_noted_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGUSR1)
    with distributed.watch_for_preemption() as preemption:
        assert not preemption.poll()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.requested.wait(60)
        assert preemption.poll()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_signal_ends_the_process_though_its_main_thread_is_busy():
    program = """
import hashlib
from ttt_e2e.cluster.distributed import watch_for_preemption
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
