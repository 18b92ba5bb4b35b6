"""The bound: every resource by hand, and links across hosts and within one."""

import pytest

from ttt_e2e.targets import Target
from ttt_e2e.targets.bound import bound, link_seconds
from ttt_e2e.targets.program import Collective

GPU = Target("gpu", "made up", memory_bytes=1, peak_flops=100.0, memory_bandwidth=10.0, devices_per_host=8)
GPU = Target(*list(vars(GPU).values())[:6], fast_link=8.0, slow_link=1.0)
MESH = {"data": 16, "model": 4}  # two of `data` and all of `model` in a host


def exchange(kind: str, axis: str, received: float = 240.0) -> Collective:
    return Collective(kind, axis, received, 1, "")


@pytest.mark.parametrize(
    "kind, axis, seconds",
    [
        ("all-reduce", "model", 240 / 8),  # within a host
        # Of 15 parts 14 come from other hosts, once for both devices there, over the links of both.
        ("all-gather", "data", 240 * 14 / 15 / 2),
        ("all-reduce", "data+model", 240 * 56 / 63 / 8),  # limited by the 8 links of a host: as fast as within one
        ("all-to-all", "data", 240 * 14 / 15),  # each receives its own
        ("collective-permute", "data", 240),  # a neighbour in another host
        ("collective-permute", "model", 240 / 8),
    ],
)
def test_links(kind, axis, seconds):
    assert link_seconds(GPU, exchange(kind, axis), MESH) == pytest.approx(max(seconds, 240 / 8))


def test_a_slice_whose_links_reach_everywhere_has_no_hosts():
    tpu = Target("tpu", "made up", fast_link=8.0)
    assert link_seconds(tpu, exchange("all-gather", "data"), MESH) == 240 / 8


@pytest.mark.parametrize(
    "flops, touched, received, binds", [(900, 1, 8, "products"), (1, 90, 8, "memory"), (1, 1, 800, "links")]
)
def test_the_longest_binds(flops, touched, received, binds):
    found = bound(GPU, flops, touched, [exchange("all-gather", "model", received)], MESH)
    assert found == (flops / 100, touched / 10, received / 8)
    assert (found.binds, found.seconds) == (binds, max(found))


def test_what_is_not_known_takes_no_time():
    assert bound(Target("cpu", "cpu"), 1.0, 1.0, [exchange("all-gather", "data")], MESH) == (0, 0, 0)
