"""What the processes of a run agree on: whether one has failed or is to stop, and numbers beside each training step."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

logger = logging.getLogger(__name__)

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: Slurm's, ahead of a job's time limit


def any_process(mine: bool) -> bool:
    """Whether it holds in any process. Every process must call it; it waits for all."""
    if jax.process_count() == 1:
        return mine
    return bool(multihost_utils.process_allgather(np.asarray(mine)).any())


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextmanager
def fail_together(kind: type[Exception], elsewhere: str):
    """A block that raises in all processes where it raises `kind` in any of them.

    A process in which it did not raises `kind(elsewhere)`. Every process must run the block; it waits for all.
    """
    failure = None
    try:
        yield
    except kind as error:
        failure = error
    if any_process(failure is not None):
        raise failure or kind(elsewhere)


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
