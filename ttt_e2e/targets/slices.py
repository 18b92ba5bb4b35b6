"""Devices to compile for that need not be present: reads "h100:64" or "v5p:2x2x2", and describes them to JAX.

The compilers come with JAX's own packages for these platforms, which need no accelerator.
"""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from ttt_e2e.config import suggestion
from ttt_e2e.errors import UserError
from ttt_e2e.targets.facts import FACTS, Target


class Gpu(NamedTuple):
    """Facts of a GPU that XLA's compiler asks for, beyond those of `Target`."""

    kind: str
    capability: int  # CUDA compute capability, major; the minor one of all these is 0
    cores: int  # streaming multiprocessors
    units: int  # float32 units of each core
    core_shared: int  # bytes of shared memory of a core
    block_shared: int  # bytes of shared memory that one thread block may use
    l2: int  # bytes of the L2 cache
    clock_ghz: float


_GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167_936, 166_912, 41_943_040, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 233_472, 232_448, 52_428_800, 1.98),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 233_472, 232_448, 52_428_800, 1.98),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 233_472, 232_448, 132_644_864, 1.965),
}
_TPUS = {"v5e": 2, "v5p": 3, "v6e": 2}  # number of dimensions of a slice
_EXTRAS = {
    "gpu": (("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"), "targets-cuda"),
    "tpu": (("libtpu",), "targets-tpu"),
}
_MAX_DEVICES = 16_384
# libtpu must not ask a metadata server, which does not exist here, nor lock TPUs, of which it needs none. It complains
# where an accelerator's type and a host's name are missing; any will do.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Slice(NamedTuple):
    """A number of connected devices of one kind."""

    name: str  # of the accelerator, such as "h100"
    shape: tuple[int, ...]  # GPUs: (number of devices,); TPUs: their grid

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.shape)


def parse(text: str) -> Slice:
    """Reads a target, such as "h100:64" or "v5p:2x2x2".

    Raises:
      UserError: the accelerator is not known, or does not come in this size.
    """
    name, _, size = text.partition(":")
    if name not in _GPUS and name not in _TPUS:
        raise UserError(f"--target={text}: there is no accelerator {name!r}: {suggestion(name, [*_GPUS, *_TPUS])}")
    dimensions = _TPUS.get(name, 1)
    shape = tuple(map(int, size.split("x"))) if re.fullmatch(r"\d{1,5}(x\d{1,5})*", size) else ()
    if len(shape) != dimensions or not 0 < math.prod(shape) <= _MAX_DEVICES:
        form = {1: "N", 2: "AxB", 3: "AxBxC"}[dimensions]
        raise UserError(f"--target={text}: it takes {name}:{form}, at most {_MAX_DEVICES} devices in all")
    if name in _GPUS and shape[0] > (host := FACTS[_GPUS[name].kind].devices_per_host) and shape[0] % host:
        raise UserError(f"--target={text}: it takes up to {host} devices, or whole hosts of {host}")
    return Slice(name, shape)


def prepare(platform: str) -> None:
    """Makes this process use the CPU only, and the compilers start without an accelerator.

    Call it before JAX starts; afterwards it has no effect.

    Raises:
      UserError: the compiler is not installed.
    """
    modules, extra = _EXTRAS[platform]
    if not any(map(_is_installed, modules)):
        raise UserError(f"compiling for this target takes the extra {extra}: pip install 'ttt-e2e[{extra}]'")
    jax.config.update("jax_platforms", "cpu")
    os.environ |= _NO_TPU_HERE | os.environ


def devices(slice_: Slice) -> list:
    """Descriptions of a slice's devices, of which a mesh can be made.

    Raises:
      UserError: the compiler is not installed, or knows no such slice.
    """
    gpu = _GPUS.get(slice_.name)
    prepare("gpu" if gpu else "tpu")
    if gpu:
        target = FACTS[gpu.kind]
        per_host = min(slice_.size, target.devices_per_host)
        options = {"target_config": _target_config(gpu, target), "topology": f"1x{slice_.size // per_host}x{per_host}"}
        return list(topologies.get_topology_desc(platform="cuda", topology_name="", **options).devices)
    name = f"{slice_.name}:{'x'.join(map(str, slice_.shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(f"--target={name}: the compiler knows no such slice ({str(error).splitlines()[0]})") from None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def _target_config(gpu: Gpu, target: Target) -> str:
    """The description of a GPU that XLA compiles for in place of a device: a `GpuTargetConfigProto` as text."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.core_shared}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {target.memory_bandwidth:.0f}
  l2_cache_size: {gpu.l2}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {target.memory_bytes}
  shared_memory_per_block_optin: {gpu.block_shared}
  cuda_compute_capability {{ major: {gpu.capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.kind}"
"""
