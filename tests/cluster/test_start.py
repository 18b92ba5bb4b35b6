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


JAX = {"JAX_COORDINATOR_ADDRESS": "host:99", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


def test_jaxs_own_variables_come_before_a_schedulers():
    assert start._from_jax(JAX) == start._from_jax(SLURM | OPEN_MPI | JAX) == Processes("host:99", 3, 2, 1)
    assert start._from_jax(dict.fromkeys(JAX, "")) is None
    # The address alone says where process 0 of a scheduler's processes is, and which is which is the scheduler's.
    address = {"JAX_COORDINATOR_ADDRESS": "host:99"}
    assert start._from_jax(SLURM | address) is None
    assert start._from_slurm(SLURM | address).coordinator == "host:99"
    assert start._from_open_mpi(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""} | address) == Processes("host:99", 4, 3, 2)


def changes(variables: dict) -> list:
    """Each variable of a scheduler taken out, emptied, and made nonsense of."""
    optional = {"SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_LOCAL_SIZE"}
    nonsense = [(name, value) for name in variables for value in ("x", "-1", "²", "[", "1 2")]
    return [(name, value) for name in variables if name not in optional for value in (None, "", " ")] + nonsense


@pytest.mark.parametrize("source", ("jax", "skypilot", "slurm", "open_mpi"))
def test_variables_half_set_or_nonsense_are_one_line_that_names_one(source):
    variables = {"jax": JAX, "skypilot": SKYPILOT, "slurm": SLURM, "open_mpi": OPEN_MPI}[source]
    read, prefix = getattr(start, f"_from_{source}"), next(iter(variables)).split("_")[0]
    refused = 0
    for name, value in changes(variables):
        env = {key: text for key, text in (variables | {name: value}).items() if text is not None}
        try:
            read(env)
        except UserError as error:
            refused += 1
            assert f"{prefix}_" in str(error) or "mpirun" in str(error), (name, value)
    # Whatever a host or list of nodes may be called is taken; numbers are not.
    assert refused >= 2 * len(variables)
    rank = next(name for name in variables if name.endswith(("RANK", "PROCID", "PROCESS_ID")))
    with pytest.raises(UserError, match=f"{rank} is 4, but it takes 0 to .* - 1 = [123]"):
        read(variables | {rank: "4"})


@pytest.mark.parametrize("missing", JAX)
def test_jaxs_variables_without_one_of_them_are_refused(missing, monkeypatch):
    for name in [*SLURM, *OPEN_MPI, *SKYPILOT, *JAX]:
        monkeypatch.delenv(name, raising=False)
    for name in set(JAX) - {missing}:
        monkeypatch.setenv(name, JAX[name])
    with pytest.raises(UserError, match=f"is set, but {missing} is not: set all of JAX_COORDINATOR_ADDRESS, "):
        start.initialize()


@pytest.mark.parametrize(
    "address", ("host", "host:", ":99", "host:x", "host:²", "host:0", "host:65536", "a..b:9", "a b:9")
)
def test_addresses_that_are_none_are_refused_wherever_they_come_from(address):
    for read in (start._from_jax, start._from_slurm, start._from_skypilot, start._from_open_mpi):
        with pytest.raises(UserError, match=r"JAX_COORDINATOR_ADDRESS=.*: it takes HOST:PORT"):
            read(JAX | SLURM | SKYPILOT | OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": address})
    with pytest.raises(UserError, match=r"--coordinator=.*: it takes HOST:PORT"):
        start.initialize(address, 2, 0)
    with pytest.raises(UserError, match="JAX_COORDINATOR_PORT"):
        start._from_skypilot(SKYPILOT | {"JAX_COORDINATOR_PORT": "65536" if address == "host" else address})


def test_local_devices_are_as_jaxs_variable_says():
    assert start._local_devices({}, several_per_node=False) == []
    assert start._local_devices({}, several_per_node=True) is None
    assert start._local_devices({"JAX_LOCAL_DEVICE_IDS": "0, 2"}, several_per_node=True) == [0, 2]
    with pytest.raises(UserError, match="JAX_LOCAL_DEVICE_IDS is 'a'"):
        start._local_devices({"JAX_LOCAL_DEVICE_IDS": "a"}, several_per_node=False)


def test_jaxs_variables_start_jax(monkeypatch):
    for name in [*SLURM, *OPEN_MPI, *SKYPILOT]:
        monkeypatch.delenv(name, raising=False)
    for name in JAX:
        monkeypatch.setenv(name, JAX[name])
    started = []
    monkeypatch.setattr(start, "meet", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(start.jax.distributed, "initialize", lambda *arguments, **_: started.append(arguments))
    assert not start.initialize()
    assert started == [("host:99", 3, 2, 300), ("host:99", 3, 2)]


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
    for name in [*SLURM, *OPEN_MPI, *SKYPILOT, *JAX]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(start.jax.distributed, "initialize", None)
    assert start.initialize()
    assert start.initialize("host:1", 1, 0)
