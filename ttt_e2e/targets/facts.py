"""Targets, which programs are compiled for: memory and speeds of one accelerator, which need not be present.

Sources of the figures: docs/targets.md.
"""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Target:
    """One device of an accelerator. A figure that is not known is 0."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # as JAX names the device
    memory_bytes: int = 0
    peak_flops: float = 0.0  # a second, of dense bfloat16 matrix products
    memory_bandwidth: float = 0.0  # bytes a second
    devices_per_host: int = 0  # that are connected by fast links; 0 = all of a slice
    fast_link: float = 0.0  # bytes a second that a device receives from others of its host, or of its slice
    slow_link: float = 0.0  # bytes a second that a device receives from other hosts


GIB = 2**30
_FACTS = (
    Target("gpu", "NVIDIA A100-SXM4-80GB", 85_100_068_864, 312e12, 2.039e12, 8, 300e9, 25e9),
    Target("gpu", "NVIDIA H100 80GB HBM3", 84_942_979_072, 989e12, 3.35e12, 8, 450e9, 50e9),
    Target("gpu", "NVIDIA H200", 151_397_597_184, 989e12, 4.8e12, 8, 450e9, 50e9),
    Target("gpu", "NVIDIA B200", 191_514_411_008, 2250e12, 7.7e12, 8, 900e9, 50e9),
    Target("tpu", "TPU v4", 32 * GIB, 275e12, 1.2e12, 0, 300e9),
    Target("tpu", "TPU v5 lite", 16 * GIB, 197e12, 0.8e12, 0, 200e9),
    Target("tpu", "TPU v5", 95 * GIB, 459e12, 2.765e12, 0, 600e9),
    Target("tpu", "TPU v6 lite", 32 * GIB, 918e12, 1.6e12, 0, 400e9),
)
FACTS = {target.kind: target for target in _FACTS}


def of_device(device) -> Target:
    """The `Target` of a device, or of a mesh's abstract device; for a kind not in `FACTS`, only platform and kind."""
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    return FACTS.get(device.device_kind, Target(platform, device.device_kind))


def current() -> Target:
    """The `Target` of the program being traced: its mesh's device, which need not be present, else the first device."""
    return of_device(jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0])
