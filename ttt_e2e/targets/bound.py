"""A lower bound (roofline) of a program's run time on a target: products, memory and links at their peak rates."""

from typing import NamedTuple

import numpy as np

from ttt_e2e.targets.facts import Target
from ttt_e2e.targets.program import Collective

# The share of the bound's speed that a step is assumed to reach, for a second, slower estimate of its speed.
SHARE = 0.4


class Bound(NamedTuple):
    """Seconds that each resource is busy for at its peak rate. With perfect overlap, a run takes the longest."""

    products: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The lower bound of the run time: the longest of the three."""
        return max(self)

    @property
    def binds(self) -> str:
        """Name of the resource that takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def bound(target: Target, flops: float, touched_bytes: float, exchanged: list[Collective], mesh_shape) -> Bound:
    """The `Bound` of a program, from the amounts of one device.

    Args:
      target: what the program runs on.
      flops: of its matrix products.
      touched_bytes: bytes of memory that it reads or writes, each counted once. How often it does is not known.
      exchanged: its collectives.
      mesh_shape: size of each axis by name, as of `Mesh.shape`.
    """
    links = sum(link_seconds(target, collective, mesh_shape) for collective in exchanged)
    return Bound(_over(flops, target.peak_flops), _over(touched_bytes, target.memory_bandwidth), links)


def link_seconds(target: Target, collective: Collective, mesh_shape) -> float:
    """The least seconds that a collective takes, all its runs together.

    Of the n devices of a group, g are in one host. With the best algorithms, data from other hosts enters a host once,
    over the links of all g devices together; in an all-to-all and a permutation each device receives its own.
    """
    n, g = _group(collective.axis, mesh_shape, target.devices_per_host)
    received = collective.received_bytes
    fast = _over(received, target.fast_link)
    if g == n:
        return fast
    if collective.kind == "collective-permute":
        return max(fast, _over(received, target.slow_link))
    outside = received * (n - g) / (n - 1)
    sharers = 1 if collective.kind == "all-to-all" else g
    return max(fast, _over(outside, target.slow_link * sharers))


def _group(axis: str, mesh_shape, devices_per_host: int) -> tuple[int, int]:
    """(Number of devices in the first device's group along `axis`, number of these that are in its host).

    axis: of the mesh, or several joined by +. Devices are numbered along the last axis first, and hosts hold
    consecutive ones.
    """
    axes = axis.split("+")
    numbers = np.arange(np.prod(list(mesh_shape.values()))).reshape(tuple(mesh_shape.values()))
    group = numbers[tuple(slice(None) if name in axes else 0 for name in mesh_shape)].ravel()
    return len(group), int((group < devices_per_host).sum()) if devices_per_host else len(group)


def _over(amount: float, rate: float) -> float:
    """Seconds that an amount takes at a rate; 0 where the rate is 0, which means unknown."""
    return amount / rate if rate else 0.0
