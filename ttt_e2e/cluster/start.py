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

    Call it before anything uses a device. Without `coordinator`, `num_processes` and `process_id`, these come from the
    scheduler: SkyPilot, Slurm, Open MPI, or what JAX itself detects on TPU pods and in a Kubernetes job.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are in all.
      process_id: which one this is, from 0.
      initialization_timeout: seconds to wait for all of them.
      heartbeat_timeout: seconds after which a process that no longer answers counts as dead.

    Returns:
      Whether this is process 0, the one that prints and writes.

    Raises:
      UserError: only some of the three are given, or one is not legal; or some processes, which the message names by
        number, did not come in time.
    """
    if jax.distributed.is_initialized():
        return jax.process_index() == 0
    given = _from_flags(coordinator, num_processes, process_id)
    timeouts = {"initialization_timeout": initialization_timeout, "heartbeat_timeout_seconds": heartbeat_timeout}
    processes = given or _from_skypilot(os.environ) or _from_slurm(os.environ) or _from_open_mpi(os.environ)
    if processes is None:
        if _jax_detects(os.environ):
            jax.distributed.initialize(**timeouts)
            return jax.process_index() == 0
        return True
    if processes.num_processes == 1:
        return True
    meet(processes.coordinator, processes.num_processes, processes.process_id, initialization_timeout)
    several_per_node = processes.per_node > 1 and not given
    jax.distributed.initialize(
        processes.coordinator,
        processes.num_processes,
        processes.process_id,
        # [] takes every device of this machine. None, JAX's default, takes one device for each process under a
        # scheduler: right for one process a device; a single process on a machine of 8 GPUs would get one of them.
        local_device_ids=None if several_per_node else [],
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
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator}: it takes HOST:PORT, the address of process 0")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: legal: 0 to --num_processes - 1 = {num_processes - 1}")
    return Processes(coordinator, num_processes, process_id, 1)


def _from_skypilot(env) -> Processes | None:
    """What SkyPilot's environment variables say, one process a node; None outside of it, and on one node."""
    if int(env.get("SKYPILOT_NUM_NODES", 1)) < 2:
        return None
    host = env["SKYPILOT_NODE_IPS"].split()[0]
    return Processes(_address(host, env), int(env["SKYPILOT_NUM_NODES"]), int(env["SKYPILOT_NODE_RANK"]), 1)


def _from_slurm(env) -> Processes | None:
    """What Slurm's variables say in a step of `srun`; None elsewhere: a batch script itself has no step's node list."""
    if "SLURM_STEP_NODELIST" not in env or int(env.get("SLURM_NTASKS", 1)) < 2:
        return None
    # Formats: node1 / node1,node2 / node[1-4],other / node[1,3-4]
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", env["SLURM_STEP_NODELIST"])
    port = 2**16 - 2**12 + int(env["SLURM_JOB_ID"]) % 2**12  # two jobs of a machine do not collide
    count, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_STEP_NUM_NODES", 1))
    address = _address(first[1] + (first[2] or ""), env, port)
    return Processes(address, count, int(env["SLURM_PROCID"]), -(-count // nodes))


def _from_open_mpi(env) -> Processes | None:
    """What Open MPI's variables say; None outside of it. Raises `UserError` for version 5."""
    count = int(env.get("OMPI_COMM_WORLD_SIZE", 1))
    if count < 2:
        return None
    # Up to Open MPI 4: 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    uri = re.search(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", env.get("OMPI_MCA_orte_hnp_uri", ""))
    if not uri:
        raise UserError(
            "mpirun does not say where process 0 is (Open MPI 5 does not): give --coordinator=HOST:PORT "
            "--num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK"
        )
    address = _address(uri[2] or uri[3], env, 2**16 - 2**12 + int(uri[1]) // 2**12 % 2**12)
    per_node = int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    return Processes(address, count, int(env["OMPI_COMM_WORLD_RANK"]), per_node)


def _address(host: str, env, port: int = DEFAULT_PORT) -> str:
    """HOST:PORT of process 0, unless JAX's own environment variables say otherwise."""
    host = f"[{host}]" if ":" in host else host
    return env.get("JAX_COORDINATOR_ADDRESS") or f"{host}:{env.get('JAX_COORDINATOR_PORT', port)}"


def _jax_detects(env) -> bool:
    """Whether to leave the detection of processes to JAX: on a TPU machine, and in an indexed Kubernetes job."""
    on_tpu = importlib.util.find_spec("libtpu") and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists())
    return bool(on_tpu) or ("KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env)
