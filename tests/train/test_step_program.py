"""What the compiled training step of a shipped config holds: nothing of the size of a score matrix."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ttt_e2e.cluster.mesh import make_mesh, shardings
from ttt_e2e.config import Config, MeshConfig, from_config_dict
from ttt_e2e.flags import load_config_file
from ttt_e2e.model import abstract_model
from ttt_e2e.train.optimizers import make_optimizer
from ttt_e2e.train.steps import init_state, make_train_step

CONFIGS = Path(__file__).parents[2] / "configs"


def lowered_step(spec: str, **model):
    """(config, its training step, lowered) with one sequence on each of eight devices; `model`: fields to change."""
    config = from_config_dict(load_config_file(f"{CONFIGS}/{spec}"))
    train = dataclasses.replace(config.train, global_batch_size=8)
    model = dataclasses.replace(config.model, **model)
    config = dataclasses.replace(config, model=model, train=train, mesh=MeshConfig(data=8))
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, abstract_model(config.model)[1], config.model)
    state = jax.eval_shape(lambda: init_state(config, optimizer))
    step = make_train_step(config, optimizer, mesh, shardings(state, mesh, config.model))
    return config, step.lower(state, jax.ShapeDtypeStruct((8, config.train.seq_len + 1), jnp.int32))


def score_matrices(config: Config, program: str) -> list[str]:
    """Shapes in a program's text that end like scores of a whole sequence, or of a mini-batch and all keys in view."""
    T, b, k = config.train.seq_len, config.inner.mini_batch_size, config.model.sliding_window
    shapes = re.findall(r"(?:\w\d+\[|tensor<)([\dx,]+)", program)
    ends = {(T, T), (b, k + b), (b, k + b - 1)}
    return [s for s in shapes if tuple(map(int, filter(None, re.split("[x,]", s))))[-2:] in ends]


@pytest.mark.parametrize(
    "spec",
    [
        "quickstart.py:e2e",
        "quickstart.py:full",
        pytest.param("paper.py:125m-e2e-8k", marks=pytest.mark.slow),
    ],
)
def test_no_array_has_the_size_of_a_score_matrix(spec):
    config, lowered = lowered_step(spec)
    assert not score_matrices(config, lowered.compile().as_text())


def test_dense_attention_would_be_seen():
    config, lowered = lowered_step("quickstart.py:e2e", attention_backend="reference")
    found = set(score_matrices(config, lowered.as_text()))
    assert {"1x1x3x1x1024x1024x", "1x3x1x64x128x"} <= found, found
