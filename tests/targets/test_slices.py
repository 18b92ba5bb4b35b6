"""Slices of absent accelerators: their names, and, where their compilers are installed, that these take them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ttt_e2e import targets
from ttt_e2e.cluster.mesh import make_mesh
from ttt_e2e.config import MeshConfig
from ttt_e2e.errors import UserError
from ttt_e2e.targets import facts, slices
from ttt_e2e.targets.program import collectives

# A slice of each accelerator, its devices and hosts, and what JAX calls the devices.
SLICES = {
    "a100:8": (8, 1, "NVIDIA A100-SXM4-80GB"),
    "h100:16": (16, 2, "NVIDIA H100 80GB HBM3"),
    "h200:4": (4, 1, "NVIDIA H200"),
    "b200:8": (8, 1, "NVIDIA B200"),
    "v5e:4x4": (16, 4, "TPU v5 lite"),
    "v5p:2x2x2": (8, 2, "TPU v5"),
    "v6e:2x4": (8, 2, "TPU v6 lite"),
}
LEGAL = {"h100:1": (1,), "h100:8": (8,), "h100:64": (64,), "v5p:2x2x4": (2, 2, 4), "v6e:8x16": (8, 16)}
ILLEGAL = (
    "",
    "h100",
    "h100:",
    "h100:0",
    "h100:-8",
    "h100:8.0",
    "h100:12",
    "h100:2x4",
    "h100:99999",
    "v5p:2x2",
    "v5p:2x2x0",
    "v6e:8x",
    "v4:2x2x1",
    "gpu:8",
)


def compiler(name: str) -> None:
    """Skips the test where what compiles for a slice is not installed."""
    modules, extra = slices._EXTRAS["gpu" if name[0] in "abh" else "tpu"]
    if not any(map(slices._is_installed, modules)):
        pytest.skip(f"the extra {extra} is not installed")


@pytest.mark.parametrize("text", LEGAL)
def test_slices_have_a_name_and_a_shape(text):
    assert slices.parse(text) == (text.partition(":")[0], LEGAL[text])
    assert slices.parse(text).size == np.prod(LEGAL[text])


@pytest.mark.parametrize("text", ILLEGAL)
def test_others_are_refused(text):
    with pytest.raises(UserError, match="--target="):
        slices.parse(text)


@pytest.mark.parametrize("text", SLICES)
def test_the_facts_of_every_slice_are_known(text):
    _, _, kind = SLICES[text]
    known = facts.FACTS[kind]
    assert min(known.memory_bytes, known.peak_flops, known.memory_bandwidth, known.fast_link) > 0
    assert targets.of_device(SimpleNamespace(platform="cuda", device_kind=kind)) == known


def test_a_device_without_facts_has_its_kind():
    assert targets.of_device(SimpleNamespace(platform="rocm", device_kind="MI300X")) == targets.Target("gpu", "MI300X")


@pytest.mark.parametrize("text", SLICES)
def test_the_compiler_takes_the_slice_and_numbers_devices_as_meshes_do(text):
    compiler(text)
    size, hosts, kind = SLICES[text]
    devices = slices.devices(slices.parse(text))
    assert (len(devices), len({d.process_index for d in devices})) == (size, hosts)
    assert {d.device_kind for d in devices} == {kind}
    mesh = make_mesh(MeshConfig(data=size // 2, model=2), devices)
    run = jax.shard_map(lambda x: jax.lax.psum(x, "model"), mesh=mesh, in_specs=P("data", "model"), out_specs=P("data"))
    x = jax.ShapeDtypeStruct((size, 256), jnp.float32, sharding=jax.NamedSharding(mesh, P("data", "model")))
    (found,) = collectives(jax.jit(run).lower(x).compile().as_text(), mesh.shape)
    assert (found.axis, found.received_bytes) == ("model", 2 * 128 * 4)


def test_a_slice_that_the_compiler_does_not_know_is_one_line():
    compiler("v5e:3x7")
    with pytest.raises(UserError, match="--target=v5e:3x7: the compiler knows no such slice"):
        slices.devices(slices.parse("v5e:3x7"))
