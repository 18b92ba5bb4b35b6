"""The least time that a program can take on a target, whatever its code: products, memory and links at their peaks."""

from typing import NamedTuple

import numpy as np

from ttt_e2e.targets.facts import Target
from ttt_e2e.targets.program import Collective

# Of the bound, what a step is assumed to reach where tokens a second and device-hours are said for "a share of it".
SHARE = 0.4


class Bound(NamedTuple):
    """Seconds that each resource is busy for at its peak. What overlaps best takes as long as the longest."""

    products: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The bound."""
        return max(self)

    @property
    def binds(self) -> str:
        """Which of them it is."""
        return max(self._fields, key=lambda name: getattr(self, name))


def bound(target: Target, flops: float, touched_bytes: float, exchanged: list[Collective], mesh_shape) -> Bound:
    """The bound of a program of which each device computes, touches and receives so much.

    touched_bytes: what memory holds and the program touches once at least. How often it does is not known.
    """
    links = sum(link_seconds(target, collective, mesh_shape) for collective in exchanged)
    return Bound(_over(flops, target.peak_flops), _over(touched_bytes, target.memory_bandwidth), links)


def link_seconds(target: Target, collective: Collective, mesh_shape) -> float:
    """At least what a collective takes, all its runs.

    Of the n devices of a group, g are in one host. What comes from other hosts enters a host once and by the links of
    all g, as the best algorithms have it; of an all-to-all and a permutation every device receives its own.
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
    """How many devices differ from the first one along an axis only, itself counted; how many of them are in its host.

    Devices are numbered along the last axis first, and hosts hold consecutive ones.
    """
    over = axis.split("+")
    numbers = np.arange(np.prod(list(mesh_shape.values()))).reshape(tuple(mesh_shape.values()))
    group = numbers[tuple(slice(None) if name in over else 0 for name in mesh_shape)].ravel()
    return len(group), int((group < devices_per_host).sum()) if devices_per_host else len(group)


def _over(amount: float, rate: float) -> float:
    """Seconds; 0 where the rate is not known."""
    return amount / rate if rate else 0.0
