"""What the processes of a run tell each other: failures, and numbers beside each training step."""

from collections.abc import Sequence
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def any_process(mine: bool) -> bool:
    """Whether `mine` is true in any process. Every process must call it; it waits for all."""
    if jax.process_count() == 1:
        return mine
    return bool(multihost_utils.process_allgather(np.asarray(mine)).any())


def barrier(name: str) -> None:
    """Waits until every process has called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextmanager
def fail_together(kind: type[Exception], elsewhere: str):
    """Runs a `with` block; where it raises `kind` in any process, an exception of that kind is raised in all.

    A process whose own block succeeded raises `kind(elsewhere)`. Every process must run the block; it waits for all.
    """
    failure = None
    try:
        yield
    except kind as error:
        failure = error
    if any_process(failure is not None):
        raise failure or kind(elsewhere)


class Exchange:
    """An all-gather of a few numbers of each process, beside a training step.

    It runs on the devices, after the step, and asynchronously: only who reads the result waits for it.
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
        """The k numbers of each of P processes, float32 [P, k]. Every process must call it at the same step."""
        mine = np.asarray(mine, np.float32)[None]
        if jax.process_count() == 1:
            return mine
        local = np.repeat(mine, jax.local_device_count(), axis=0)
        return self._gather(jax.make_array_from_process_local_data(self._sharding, local))
