"""Compiles Mosaic GPU modules to machine code for Hopper, with or without a GPU, in a process of its own.

XLA leaves such kernels as they are until a program is loaded; what then compiles them is a function that its CUDA
plugin exports. That function asks the CUDA driver what it compiles for and hands it the code. Where there is no GPU the
driver's place is taken by a stub, made with the C compiler, that says Hopper and loads nothing. A process of its own
because the plugin prints straight to the process's output, may end the process, and must not meet the stub later.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ttt_e2e.errors import UserError

PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
BEGINNING = "== module ==\n"  # of the text on one of them

STUB = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "NVIDIA H100 80GB HBM3", length); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : 0; /* the compute capability: 9.0 */
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuGetErrorName(int error, const char **text) { *text = "stub"; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)2; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)3; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuModuleUnload(void *module) { return 0; }
"""

# XLA's description of an H100. Compiling any program for it registers the code generator that the kernels need.
DEVICE = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
"""


def plugin() -> Path | None:
    """The library of XLA's CUDA plugin, None where it is not installed."""
    for name in PLUGINS if importlib.util.find_spec("jax_plugins") else ():
        if spec := importlib.util.find_spec(name):
            return Path(spec.origin).parent / "xla_cuda_plugin.so"
    return None


def compile_modules(modules: list[bytes]) -> list[str]:
    """Compiles modules. Returns what the compiler prints about each: its PTX, and its code's registers and spills.

    Raises `UserError` where the plugin, or both a CUDA driver and a C compiler are missing, or a module is refused.
    """
    if plugin() is None:
        raise UserError("the kernels' compiler is in JAX's CUDA plugin: pip install 'ttt-e2e[cuda]' (it needs no GPU)")
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / f"{i}" for i in range(len(modules))]
        for path, module in zip(paths, modules):
            path.write_bytes(module)
        if not _has_driver():
            _make_stub(directory)
        libraries = filter(None, [directory, os.environ.get("LD_LIBRARY_PATH")])
        settings = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-m", "ttt_e2e.bench.mosaic_compiler", *map(str, paths)],
            env=os.environ | settings | {"LD_LIBRARY_PATH": ":".join(libraries)},
            capture_output=True,
            text=True,
        )
    _, *texts = done.stdout.split(BEGINNING)
    if done.returncode or len(texts) != len(modules):
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"the compiler of Mosaic GPU kernels failed at kernel {len(texts)}: {lines[-1]}")
    return texts


def _has_driver() -> bool:
    """Whether the CUDA driver is here and finds a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        return driver.cuInit(0) == 0 and hasattr(driver, "cuDevicePrimaryCtxRetain")
    except OSError:
        return False


def _make_stub(directory: str) -> None:
    if shutil.which("cc") is None:
        raise UserError("here is neither a GPU with its driver (libcuda.so.1) nor a C compiler (cc), to make a stub")
    command = ["cc", "-shared", "-fPIC", "-o", f"{directory}/libcuda.so.1", "-x", "c", "-"]
    subprocess.run(command, input=STUB, text=True, check=True)


def _compile(paths: list[str]) -> None:
    """Runs in the process of its own: compiles each file's module, and prints where its text begins."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.pallas import mosaic_gpu  # noqa: F401  (it tells the compiler where CUDA is)

    driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    if driver.cuInit(0) or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) or driver.cuCtxSetCurrent(context):
        sys.exit("the CUDA driver does not give a context")
    described = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=DEVICE, topology="1x1x1")
    mesh = jax.sharding.Mesh(np.array(described.devices[:1]), ("x",))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), jnp.float32, sharding=there)).compile()

    compiler = ctypes.CDLL(str(plugin())).MosaicGpuCompile
    compiler.argtypes, compiler.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    for path in paths:
        print(end=BEGINNING, flush=True)
        module = Path(path).read_bytes()
        if not compiler(module, len(module)):
            sys.exit("it gives no kernel")
    ctypes.CDLL(None).fflush(None)
    os._exit(0)  # the plugin and the stub are not made to be taken down


if __name__ == "__main__":
    _compile(sys.argv[1:])
