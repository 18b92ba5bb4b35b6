"""Any mesh computes what one device computes, and every array lives where the table says."""

from dataclasses import dataclass
from functools import cache

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.tiny_run import T, tiny_run
from ttt_e2e.bench.compiled import matmul_flops
from ttt_e2e.cluster.mesh import BATCH, local_rows, make_mesh, shardings
from ttt_e2e.config import MeshConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model import abstract_model
from ttt_e2e.train.batches import check_batch
from ttt_e2e.train.optimizers import make_optimizer
from ttt_e2e.train.steps import init_state, make_train_step

# Meshes, heads, and what a device may compute, in eighths of all matrix products: the vocabulary of 31 is filled up to
# 32, and of two heads, four or eight devices compute the suffix's attention alike.
MESHES = (
    (8, 1, 2, 1.01),
    pytest.param(4, 2, 2, 1.05, marks=pytest.mark.slow),
    pytest.param(2, 4, 8, 1.05, marks=pytest.mark.slow),
    pytest.param(1, 8, 8, 1.05, marks=pytest.mark.slow),
    (1, 8, 2, 2.1),
)


def one_step(config, data: int, model: int):
    """(compiled step, metrics, parameters after it) of the first two training steps on a mesh."""
    mesh = make_mesh(MeshConfig(data=data, model=model))
    optimizer = make_optimizer(config.optimizer, abstract_model(config.model)[1], config.model)
    placed = shardings(jax.eval_shape(lambda: init_state(config, optimizer)), mesh, config.model)
    state = jax.jit(lambda: init_state(config, optimizer), out_shardings=placed)()
    tokens = np.random.default_rng(0).integers(1, 31, (8, T + 1)).astype(np.int32)
    step = make_train_step(config, optimizer, mesh, placed).lower(state, tokens).compile()
    tokens = jax.device_put(tokens, jax.NamedSharding(mesh, BATCH))
    state, _ = step(state, tokens)  # the first has rate 0
    state, metrics = step(state, tokens)
    return step, jax.device_get(metrics), jax.device_get(state.params)


@pytest.fixture(scope="module")
def config(token_store):
    return tiny_run(token_store)


@pytest.fixture(scope="module")
def with_heads(token_store):
    """Number of heads -> configuration, and `one_step` of it on a single device."""

    @cache
    def with_heads(heads: int):
        config = tiny_run(token_store, model={"num_attention_heads": heads})
        return config, one_step(config, 1, 1)

    return with_heads


@pytest.mark.parametrize(("data", "model", "heads", "eighths"), MESHES)
def test_every_mesh_gives_the_single_device_step(data, model, heads, eighths, with_heads):
    config, (step_1, metrics_1, params_1) = with_heads(heads)
    step, metrics, params = one_step(config, data, model)
    # Float32, sums in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), metrics, metrics_1)
    # One AdamW step of 1.5e-3 is at most the sign of each gradient: where that is near 0 rounding decides.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, params_1)
    per_device = 8 // data
    width = 24 // model
    # The fast weights that the inner scan carries: those of this device's own sequences only, and its share of each.
    assert f"f32[{per_device},1,16,{width}]" in step.as_text()
    if data > 1:
        assert f"f32[8,1,16,{width}]" not in step.as_text()
    # Each device reads its own sequences, and no others.
    assert matmul_flops(step.as_text()) * 8 <= eighths * matmul_flops(step_1.as_text())


@dataclass(frozen=True)
class TPUChip:
    """What JAX asks of a device to place it in a mesh."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    process_index: int = 0
    core_on_chip: int = 0


def test_a_mesh_that_splits_an_axis_of_a_tpu_slice():
    """16 x 2 devices of a torus of 4 x 8, which `jax.make_mesh` refuses."""
    mesh = make_mesh(MeshConfig(data=16, model=2), [TPUChip(i, (i // 8, i % 8, 0)) for i in range(32)])
    assert dict(mesh.shape) == {"data": 16, "model": 2}
    chips = list(mesh.devices.flat)
    assert sorted(chip.id for chip in chips) == list(range(32))
    for left, right in zip(chips[::2], chips[1::2]):  # those of one sequence are neighbours of the torus
        assert abs(np.subtract(left.coords, right.coords)).sum() in (1, 7)


def test_parameters_and_optimizer_state_are_sharded_over_both_axes(config):
    mesh = make_mesh(MeshConfig(data=4, model=2))
    optimizer = make_optimizer(config.optimizer, abstract_model(config.model)[1], config.model)
    placed = shardings(jax.eval_shape(lambda: init_state(config, optimizer)), mesh, config.model)
    assert placed.params["slow"]["prefix"]["attention"]["wq"].spec == P(None, "data", "model")
    assert placed.params["fast"]["suffix"]["fast_mlp"]["w2"].spec == P(None, "model", "data")
    moments = [s for path, s in jax.tree_util.tree_leaves_with_path(placed.optimizer) if "wq" in str(path)]
    assert moments and all(s.spec == P(None, "data", "model") for s in moments)
    # 31 token ids do not divide by 2: that dimension stays whole.
    assert placed.params["slow"]["embedding"].spec == P(None, "data")


@pytest.mark.parametrize(("data", "model"), ((16, 1), (0, 16), (5, 2)))
def test_a_mesh_larger_than_the_machine_is_refused(data, model):
    with pytest.raises(UserError, match=rf"config.mesh is data={data} x model={model}.* 8 device"):
        make_mesh(MeshConfig(data=data, model=model))


def test_a_batch_that_does_not_spread_over_the_data_axis_is_refused():
    mesh = make_mesh(MeshConfig(data=4, model=2))
    check_batch("config.train.global_batch_size", 16, mesh, accumulation_steps=2)
    with pytest.raises(UserError, match=r"config.train.global_batch_size is 12, but it must be a multiple of 8"):
        check_batch("config.train.global_batch_size", 12, mesh, accumulation_steps=2)


def test_local_rows_are_all_rows_on_one_process():
    mesh = make_mesh(MeshConfig(data=4, model=2))
    np.testing.assert_array_equal(local_rows(mesh, 8), np.arange(8))
