"""Products are made in the dtype that the model computes in: no platform may round a float32 model's to TF32."""

import contextlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.tiny_run import T, tiny_run
from ttt_e2e.cluster.mesh import make_mesh, shardings
from ttt_e2e.config import Config, MeshConfig
from ttt_e2e.inference.reader import Reader
from ttt_e2e.kernels.attention import primitives
from ttt_e2e.model import abstract_model
from ttt_e2e.train import steps

PRECISION = {"float32": "HIGHEST", "bfloat16": "DEFAULT"}


def train_step(config: Config, mesh):
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(lambda: steps.init_state(config, optimizer))
    placed = shardings(state, mesh, config.model)
    tokens = jax.ShapeDtypeStruct((8, T + 1), jnp.int32)
    return {"train": (steps.make_train_step(config, optimizer, mesh, placed), (state, tokens))}


def eval_step(config: Config, mesh):
    _, params = abstract_model(config.model)
    step = steps.make_eval_step(config, mesh, shardings(params, mesh, config.model))
    return {"eval": (step, (params, jax.ShapeDtypeStruct((4, T + 1), jnp.int32), 0.5, 4))}


def reader(config: Config, mesh):
    params = jax.jit(lambda: steps.init_state(config, optax.identity()).params)()
    reader = Reader(abstract_model(config.model)[0], params, config, max_length=2 * T)
    programs = reader.programs(reader.start(1))
    return {name: programs[name] for name in ("mini_batch", "predict")}


def precisions(config: Config, make) -> set[str]:
    """Of every matrix product in the programs, lowered."""
    mesh = make_mesh(MeshConfig(data=1))
    found = set()
    for function, arguments in make(config, mesh).values():
        program = function.lower(*arguments).as_text()
        dots = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
        of_each = [re.search(r"precision = \[(\w+), (\w+)\]", line).groups() for line in dots]
        assert of_each
        found |= {precision for pair in of_each for precision in pair}
    return found


@pytest.mark.parametrize("make", (train_step, eval_step, reader))
@pytest.mark.parametrize("kind", ("fast", "plain"))
@pytest.mark.parametrize("dtype", PRECISION)
def test_every_product_has_the_precision_of_the_compute_dtype(dtype, kind, make, token_store):
    config = tiny_run(token_store, model={"compute_dtype": dtype, "num_fast_blocks": int(kind == "fast")})
    assert precisions(config, make) == {PRECISION[dtype]}


def test_products_of_kernels_that_are_left_out_would_be_seen(token_store, monkeypatch):
    """Kernels are traced when a program is lowered: the context of the program alone would leave them as they are."""
    monkeypatch.setattr(primitives, "matmul_precision", lambda dtype: contextlib.nullcontext())
    assert precisions(tiny_run(token_store), eval_step) == {"HIGHEST", "DEFAULT"}


def test_a_program_without_the_context_would_be_seen(token_store, monkeypatch):
    monkeypatch.setattr(steps, "matmul_precision", lambda dtype: lambda function: function)
    assert "DEFAULT" in precisions(tiny_run(token_store), eval_step)
