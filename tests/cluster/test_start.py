"""Who a process is among others, by flags or environment."""

import socket

import pytest

from ttt_e2e.cluster import start
from ttt_e2e.cluster.start import Processes
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
    assert start._from_slurm(SLURM) == Processes("gpu07:61444", 4, 2, 1)
    assert start._from_slurm(SLURM | {"SLURM_STEP_NUM_NODES": "1"}).per_node == 4


@pytest.mark.parametrize(
    "nodes, first",
    (("a1", "a1"), ("a1,b2", "a1"), ("a[1,7-9],b", "a1"), ("a-b[007-9]", "a-b007"), ("x-1.site,y", "x-1.site")),
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert start._from_slurm(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{first}:61444"


@pytest.mark.parametrize("without", ("SLURM_STEP_NODELIST", "SLURM_NTASKS"))
def test_a_batch_script_or_one_task_is_no_run_of_many(without):
    assert start._from_slurm({k: v for k, v in SLURM.items() if k != without}) is None


def test_open_mpi():
    assert start._from_open_mpi(OPEN_MPI) == Processes(f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}", 4, 3, 2)
    with pytest.raises(UserError, match="give --coordinator=HOST:PORT"):
        start._from_open_mpi(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""})


def test_skypilot():
    assert start._from_skypilot(SKYPILOT) == Processes("10.0.0.1:8476", 2, 1, 1)
    assert start._from_skypilot(SKYPILOT | {"JAX_COORDINATOR_PORT": "99"}).coordinator == "10.0.0.1:99"
    assert start._from_skypilot({"SKYPILOT_NUM_NODES": "1"}) is None


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
        start.initialize(*flags)


def test_alone_it_opens_no_connection(monkeypatch):
    for name in [*SLURM, *OPEN_MPI, *SKYPILOT]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(start.jax.distributed, "initialize", None)
    assert start.initialize()
    assert start.initialize("host:1", 1, 0)
