"""Joins the processes of a run: finds each one's number from its flags or its scheduler, starts JAX's multi-controller
runtime once all have met (meeting.py), and ends it.
"""

import importlib.util
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax

from ttt_e2e.cluster.meeting import meet
from ttt_e2e.errors import EXIT_REQUEUE, UserError

DEFAULT_PORT = 8476
_ADDRESS = "JAX_COORDINATOR_ADDRESS"


class Processes(NamedTuple):
    """This process's number, and that of all processes of its run."""

    coordinator: str  # HOST:PORT, at which process 0 listens
    num_processes: int
    process_id: int
    per_node: int  # processes on this machine


def initialize(
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> bool:
    """Joins the run's other processes; does nothing, and needs no network, if there are none.

    Call it before anything uses a device. Without `coordinator`, `num_processes` and `process_id`, they come from JAX's
    variables (`JAX_COORDINATOR_ADDRESS`, ...), or from the scheduler: SkyPilot, Slurm, Open MPI, or what JAX itself
    detects on TPU pods and in a Kubernetes job.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are in all.
      process_id: which one this is, from 0.
      initialization_timeout: seconds to wait for all of them.
      heartbeat_timeout: seconds after which a process that no longer answers counts as dead.

    Returns:
      Whether this is process 0, the one that prints and writes.

    Raises:
      UserError: only some of the three are given, or one is not legal, and likewise of variables; or some processes,
        which the message names by number, did not come in time.
    """
    if jax.distributed.is_initialized():
        return jax.process_index() == 0
    given = _from_flags(coordinator, num_processes, process_id)
    timeouts = {"initialization_timeout": initialization_timeout, "heartbeat_timeout_seconds": heartbeat_timeout}
    sources = (_from_jax, _from_skypilot, _from_slurm, _from_open_mpi)
    processes = given or next(filter(None, (source(os.environ) for source in sources)), None)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from cluster/signals.py
    if processes is None:
        if _jax_detects(os.environ):
            jax.distributed.initialize(**timeouts)
            return jax.process_index() == 0
        return True
    if processes.num_processes == 1:
        return True
    local_devices = _local_devices(os.environ, processes.per_node > 1)
    meet(processes.coordinator, processes.num_processes, processes.process_id, initialization_timeout)
    jax.distributed.initialize(
        processes.coordinator,
        processes.num_processes,
        processes.process_id,
        local_device_ids=local_devices,
        **timeouts,
    )
    return processes.process_id == 0


def leave(code: int) -> None:
    """Leaves the run, before this process exits with `code`.

    If all processes end with this code (done, preempted), each waits for the others, so that none of these counts it as
    dead. Otherwise it exits at once: JAX's shutdown would wait for processes that never come.
    """
    if not jax.distributed.is_initialized():
        return
    if code in (0, EXIT_REQUEUE):
        jax.distributed.shutdown()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        # The others mostly fail for the same reason, and need process 0 alive until they have printed it.
        time.sleep(2)
    os._exit(code)


def is_of_a_peer(error: Exception) -> bool:
    """Whether an exception means that another process of the run is gone, and not that this one has a defect."""
    if not (jax.distributed.is_initialized() and isinstance(error, jax.errors.JaxRuntimeError)):
        return False
    return re.search(r"Gloo|NCCL|UNAVAILABLE|[Hh]eartbeat|Connection (closed|reset)", str(error)) is not None


def _from_flags(coordinator: str, num_processes: int, process_id: int) -> Processes | None:
    """What the flags say; None if none is given. Raises `UserError` if only some are, or one is not legal."""
    given = {"coordinator": coordinator, "num_processes": num_processes or "", "process_id": process_id}
    missing = [name for name, value in given.items() if value in ("", -1)]
    if len(missing) == 3:
        return None
    if missing:
        present = next(name for name in given if name not in missing)
        raise UserError(f"--{present} is given, but --{missing[0]} is not: give all of --{', --'.join(given)}, or none")
    _check_address("--coordinator", coordinator)
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: legal: 0 to --num_processes - 1 = {num_processes - 1}")
    return Processes(coordinator, num_processes, process_id, 1)


# The functions below raise `UserError` where a variable that they need is missing, or holds what it should not.


def _from_jax(env) -> Processes | None:
    """What JAX's own variables say; None without them. The address alone is for those that a scheduler has started."""
    names = (_ADDRESS, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    present = [name for name in names if env.get(name)]
    if not present or (present == [_ADDRESS] and (_is_scheduled(env) or _jax_detects(env))):
        return None
    for name in names:
        if name not in present:
            raise UserError(f"{present[0]} is set, but {name} is not: set all of {', '.join(names)}, or none")
    return _processes(env, _address("", env), *names[1:])


def _from_skypilot(env) -> Processes | None:
    """What SkyPilot's environment variables say, one process a node; None outside of it, and on one node."""
    names = ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS")
    if not any(env.get(name) for name in names) or _number(env, names[0], 1) < 2:
        return None
    host = _text(env, "SKYPILOT_NODE_IPS", "the addresses of all nodes").split()[0]
    return _processes(env, _address(host, env, source=names[2]), *names[:2])


def _from_slurm(env) -> Processes | None:
    """What Slurm's variables say in a step of `srun`; None elsewhere: a batch script itself has no step's node list."""
    if not env.get("SLURM_STEP_NODELIST") or _number(env, "SLURM_NTASKS", 1, default=1) < 2:
        return None
    # Formats: node1 / node1,node2 / node[1-4],other / node[1,3-4]
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", env["SLURM_STEP_NODELIST"])
    if not first:
        raise UserError(f"SLURM_STEP_NODELIST is {env['SLURM_STEP_NODELIST']!r}, but it takes the names of nodes")
    port = 2**16 - 2**12 + _number(env, "SLURM_JOB_ID", 0) % 2**12  # two jobs of a machine do not collide
    nodes = _number(env, "SLURM_STEP_NUM_NODES", 1, default=1)
    address = _address(first[1] + (first[2] or ""), env, port, "SLURM_STEP_NODELIST")
    found = _processes(env, address, "SLURM_NTASKS", "SLURM_PROCID")
    return found._replace(per_node=-(-found.num_processes // nodes))


def _from_open_mpi(env) -> Processes | None:
    """What Open MPI's variables say; None outside of it. Raises `UserError` for version 5, if there is no address."""
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    if not any(env.get(name) for name in names) or _number(env, names[0], 1) < 2:
        return None
    # Up to Open MPI 4: 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    uri = re.search(r"([0-9]+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", env.get("OMPI_MCA_orte_hnp_uri", ""))
    if not uri and not env.get(_ADDRESS):
        raise UserError(
            f"mpirun does not say where process 0 is (Open MPI 5 does not): set {_ADDRESS}=HOST:PORT, or give "
            "--coordinator=HOST:PORT --num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK"
        )
    host, port = (uri[2] or uri[3], 2**16 - 2**12 + int(uri[1]) // 2**12 % 2**12) if uri else ("", DEFAULT_PORT)
    per_node = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1, default=1)
    return _processes(env, _address(host, env, port, "OMPI_MCA_orte_hnp_uri"), *names)._replace(per_node=per_node)


def _processes(env, address: str, count: str, rank: str) -> Processes:
    """`Processes`, one on each machine, by the variables named `count` and `rank`."""
    num_processes, process_id = _number(env, count, 1), _number(env, rank, 0)
    if process_id >= num_processes:
        raise UserError(f"{rank} is {process_id}, but it takes 0 to {count} - 1 = {num_processes - 1}")
    return Processes(address, num_processes, process_id, 1)


def _number(env, name: str, lowest: int, highest: int = 10**9, default: int | None = None) -> int:
    """The integer in a variable; `default` if that is given, and the variable is not set or empty."""
    if default is not None and not env.get(name):
        return default
    takes = f"an integer from {lowest} to {highest}"
    text = _text(env, name, takes)
    if not re.fullmatch(r"\s*[0-9]{1,10}\s*", text) or not lowest <= int(text) <= highest:
        raise UserError(f"{name} is {text!r}, but it takes {takes}")
    return int(text)


def _text(env, name: str, takes: str) -> str:
    """What a variable holds, which is not empty; `takes` says what it should be."""
    if not env.get(name, "").strip():
        state = "empty" if name in env else "not set"
        others = ", ".join(sorted(other for other in env if other.split("_")[0] == name.split("_")[0])[:3])
        raise UserError(
            f"{name} is {state}, but it takes {takes}, as others of its kind are set ({others}): set it too, or give "
            "--coordinator, --num_processes and --process_id"
        )
    return env[name]


def _address(host: str, env, port: int = DEFAULT_PORT, source: str = "") -> str:
    """HOST:PORT of process 0, unless JAX's variables say otherwise; `source` is the variable that names the host."""
    if env.get(_ADDRESS):
        _check_address(_ADDRESS, env[_ADDRESS])
        return env[_ADDRESS]
    port = _number(env, "JAX_COORDINATOR_PORT", 1, 2**16 - 1, default=port)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    _check_address(source, address)
    return address


def _check_address(name: str, address: str) -> None:
    """Raises `UserError` if `address`, which `name` holds, is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[^\s.]\S*", host) or ".." in host or not re.fullmatch(r"[0-9]{1,5}", port):
        raise UserError(f"{name}={address}: it takes HOST:PORT, the address of process 0")
    if not 0 < int(port) < 2**16:
        raise UserError(f"{name}={address}: it takes HOST:PORT, and a port is 1 to {2**16 - 1}")


def _local_devices(env, several_per_node: bool) -> list[int] | None:
    """The devices of its machine that this process takes: `JAX_LOCAL_DEVICE_IDS`, or what JAX makes of the result.

    [] takes every device of this machine. None, JAX's default, takes one device for each process under a scheduler:
    right for one process a device; a single process on a machine of 8 GPUs would get one of them.
    """
    ids = env.get("JAX_LOCAL_DEVICE_IDS", "")
    if not ids:
        return None if several_per_node else []
    if not re.fullmatch(r"\s*[0-9]{1,4}\s*(,\s*[0-9]{1,4}\s*)*", ids):
        raise UserError(f"JAX_LOCAL_DEVICE_IDS is {ids!r}, but it takes numbers of devices, such as 0,1")
    return [int(number) for number in ids.split(",")]


def _is_scheduled(env) -> bool:
    """Whether a scheduler that this module knows has started the process, be it alone or with others."""
    return any(env.get(name) for name in ("SKYPILOT_NUM_NODES", "SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE"))


def _jax_detects(env) -> bool:
    """Whether to leave the detection of processes to JAX: on a TPU machine, and in an indexed Kubernetes job."""
    on_tpu = importlib.util.find_spec("libtpu") and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists())
    return bool(on_tpu) or ("KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env)
