"""Many processes as one run: who they are, how they find each other, and how they agree to stop.

JAX's multi-controller runtime does the work. Before it starts, the processes of a run meet at the coordinator's address
(`_meet`): JAX ends a process with a C++ stack trace where a peer never comes, and does not say which.
"""

import importlib.util
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.errors import EXIT_REQUEUE, UserError

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8476
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: Slurm's, ahead of a job's time limit


class Processes(NamedTuple):
    """Where this process stands among those of a run."""

    coordinator: str  # HOST:PORT, at which process 0 listens
    num_processes: int
    process_id: int
    per_node: int  # of these processes, on this machine


# ------------------------------------------------------------------------------------------------------------ start up


def initialize(
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> bool:
    """Joins the run's other processes; does nothing, and needs no network, where there are none.

    Call it before anything uses a device. Without `coordinator`, `num_processes` and `process_id`, they are those of
    the scheduler: SkyPilot, Slurm, Open MPI, or what JAX finds on TPU pods and in a Kubernetes job.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are in all.
      process_id: which one this is, from 0.
      initialization_timeout: seconds to wait for all of them.
      heartbeat_timeout: seconds after which one that no longer answers is taken for dead.

    Returns:
      Whether this is process 0, which speaks for all.

    Raises:
      UserError: only some of the three are given, or they are not legal; processes did not come in time (by number).
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
    _meet(processes, initialization_timeout)
    several_per_node = processes.per_node > 1 and not given
    jax.distributed.initialize(
        processes.coordinator,
        processes.num_processes,
        processes.process_id,
        # An empty list is every device of this machine. JAX's own choice under a scheduler, None, is one for each
        # process: right where there are as many processes as devices, one GPU of eight where there is one a machine.
        local_device_ids=None if several_per_node else [],
        **timeouts,
    )
    return processes.process_id == 0


def leave(code: int) -> None:
    """Ends this process's part in the run, before it exits with `code`.

    Where all processes end alike, each waits for the others, so that none takes it for dead. Otherwise it exits here
    and now: JAX's own way out would wait for those that do not come.
    """
    if not jax.distributed.is_initialized():
        return
    if code in (0, EXIT_REQUEUE):
        jax.distributed.shutdown()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        # The others fail alike, mostly, and need process 0 for as long as it takes them to say so.
        time.sleep(2)
    os._exit(code)


def is_of_a_peer(error: Exception) -> bool:
    """Whether an exception says that another process of the run is gone, rather than what is wrong in this one."""
    if not (jax.distributed.is_initialized() and isinstance(error, jax.errors.JaxRuntimeError)):
        return False
    return re.search(r"Gloo|NCCL|UNAVAILABLE|[Hh]eartbeat|Connection (closed|reset)", str(error)) is not None


def _from_flags(coordinator: str, num_processes: int, process_id: int) -> Processes | None:
    given = {"coordinator": coordinator, "num_processes": num_processes or "", "process_id": process_id}
    missing = [name for name, value in given.items() if value in ("", -1)]
    if len(missing) == 3:
        return None
    if missing:
        there = next(name for name in given if name not in missing)
        raise UserError(f"--{there} is given, but --{missing[0]} is not: give all of --{', --'.join(given)}, or none")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator}: it takes HOST:PORT, the address of process 0")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: legal: 0 to --num_processes - 1 = {num_processes - 1}")
    return Processes(coordinator, num_processes, process_id, 1)


def _from_skypilot(env) -> Processes | None:
    if int(env.get("SKYPILOT_NUM_NODES", 1)) < 2:
        return None
    host = env["SKYPILOT_NODE_IPS"].split()[0]
    return Processes(_address(host, env), int(env["SKYPILOT_NUM_NODES"]), int(env["SKYPILOT_NODE_RANK"]), 1)


def _from_slurm(env) -> Processes | None:
    """A step of `srun`: in a batch script itself, there is no step's node list."""
    if "SLURM_STEP_NODELIST" not in env or int(env.get("SLURM_NTASKS", 1)) < 2:
        return None
    # Formats: node1 / node1,node2 / node[1-4],other / node[1,3-4]
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", env["SLURM_STEP_NODELIST"])
    port = 2**16 - 2**12 + int(env["SLURM_JOB_ID"]) % 2**12  # two jobs of a machine do not collide
    count, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_STEP_NUM_NODES", 1))
    address = _address(first[1] + (first[2] or ""), env, port)
    return Processes(address, count, int(env["SLURM_PROCID"]), -(-count // nodes))


def _from_open_mpi(env) -> Processes | None:
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
    """JAX's own variables have the last word."""
    host = f"[{host}]" if ":" in host else host
    return env.get("JAX_COORDINATOR_ADDRESS") or f"{host}:{env.get('JAX_COORDINATOR_PORT', port)}"


def _jax_detects(env) -> bool:
    """Whether JAX should look for a cluster of its own: on a TPU machine, and in an indexed Kubernetes job."""
    on_tpu = importlib.util.find_spec("libtpu") and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists())
    return bool(on_tpu) or ("KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env)


def _meet(processes: Processes, timeout: float) -> None:
    """Returns once all processes have called; raises `UserError`, in all that have, naming those that have not.

    Each process connects to process 0 and says who it is; process 0 answers "go", or what is wrong.
    """
    host, _, port = processes.coordinator.rpartition(":")
    address, deadline = (host.strip("[]"), int(port)), time.monotonic() + timeout
    verdict = _host_meeting(address[1], processes, deadline) if processes.process_id == 0 else ""
    if processes.process_id:
        verdict = _join_meeting(address, processes, deadline, timeout)
    if verdict != "go":
        raise UserError(verdict.format(timeout=timeout, n=processes.num_processes))


def _host_meeting(port: int, processes: Processes, deadline: float) -> str:
    callers: dict[int, socket.socket] = {}
    wrong = ""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        listener = socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=1024
        )
    except OSError as error:
        raise UserError(f"process 0 cannot listen at port {port} ({error.strerror}): choose another one") from None
    with listener:
        while len(callers) < processes.num_processes - 1 and not wrong and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                caller, _ = listener.accept()
            except TimeoutError:
                break
            caller.settimeout(min(left, 10))
            told = re.fullmatch(r"ttt-e2e (\d+) (\d+)\n", _line(caller))
            if not told:  # a stranger, or gone again
                caller.close()
                continue
            number, count = int(told[1]), int(told[2])
            if count != processes.num_processes:
                wrong = f"process {number} was told of {count} processes, process 0 of {processes.num_processes}"
            elif number in callers or number == 0:
                wrong = f"two processes have the number {number}: each needs its own"
            callers[number if not wrong else -1] = caller
        missing = sorted(set(range(1, processes.num_processes)) - set(callers))
        if missing and not wrong:
            wrong = f"process {', '.join(map(str, missing))} of {{n}} did not come within {{timeout}} seconds"
        verdict = wrong or "go"
        for caller in callers.values():
            with caller:
                _say(caller, verdict)
    return verdict


def _join_meeting(address: tuple[str, int], processes: Processes, deadline: float, timeout: float) -> str:
    reason = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=min(left, 10)) as connection:
                connection.sendall(f"ttt-e2e {processes.process_id} {processes.num_processes}\n".encode())
                connection.settimeout(left + 5)  # process 0 is given time to say who is missing
                if verdict := _line(connection).strip():
                    return verdict
                reason = "it hung up"
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.1)
    return f"process 0 at {processes.coordinator} did not answer within {timeout} seconds ({reason})"


def _line(connection: socket.socket) -> str:
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < 1000 and (more := connection.recv(100)):
            received += more
    except OSError:
        return ""
    return received.decode(errors="replace")


def _say(connection: socket.socket, line: str) -> None:
    try:
        connection.sendall(f"{line}\n".encode())
        connection.settimeout(1)
        connection.recv(1)  # lets the caller hang up first: the port is free at once, for JAX
    except OSError:
        return


# ----------------------------------------------------------------------------------------------------------- agreement


def any_process(mine: bool) -> bool:
    """Whether it holds in any process. Every process must call it; it waits for all."""
    if jax.process_count() == 1:
        return mine
    return bool(multihost_utils.process_allgather(np.asarray(mine)).any())


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class Exchange:
    """Numbers that every process states beside a training step, and all processes read.

    They are gathered over the devices, behind the step itself: nobody waits for them who does not read them.
    """

    def __init__(self):
        if jax.process_count() > 1:
            devices = jax.devices()
            mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
            processes = [device.process_index for device in devices]
            first = np.array([processes.index(process) for process in range(jax.process_count())])
            self._sharding = NamedSharding(mesh, P("all"))
            self._gather = jax.jit(lambda x: x[first], out_shardings=NamedSharding(mesh, P()))

    def __call__(self, mine: Sequence[float]) -> np.ndarray | jax.Array:
        """Of k numbers, those of all P processes, float32 [P, k]. Every process must call it at the same step."""
        mine = np.asarray(mine, np.float32)[None]
        if jax.process_count() == 1:
            return mine
        local = np.repeat(mine, jax.local_device_count(), axis=0)
        return self._gather(jax.make_array_from_process_local_data(self._sharding, local))


class Preemption:
    """Whether this process was asked to stop (`requested`), and whether any was (`poll`)."""

    def __init__(self):
        self.requested = threading.Event()

    def poll(self) -> bool:
        """Asks all processes, each of which must call it; waits for all."""
        return any_process(self.requested.is_set())


@contextmanager
def watch_for_preemption():
    """A `Preemption` that SIGTERM or SIGUSR1 sets; a second signal ends the process at once, with code 128 + signal.

    A thread reads the signals' numbers, since Python's own handlers wait for as long as JAX keeps the main thread.
    Off the main thread, where Python takes no signals, nothing is watched.
    """
    preemption = Preemption()
    if threading.current_thread() is not threading.main_thread():
        yield preemption
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(reader, preemption), daemon=True)
    before = {number: signal.signal(number, lambda *_: None) for number in PREEMPTION_SIGNALS}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher.start()
    try:
        yield preemption
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        writer.close()
        watcher.join()
        reader.close()


def _watch(reader: socket.socket, preemption: Preemption) -> None:
    while received := reader.recv(1):
        number = received[0]
        if number not in PREEMPTION_SIGNALS:
            continue
        if preemption.requested.is_set():
            os._exit(128 + number)
        preemption.requested.set()
        logger.warning("%s: saving, then stopping; a second signal stops at once", signal.Signals(number).name)
