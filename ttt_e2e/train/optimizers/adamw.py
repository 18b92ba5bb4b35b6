"""AdamW, with decay on every parameter."""

import optax
from jax.sharding import Mesh

from ttt_e2e.config import OptimizerConfig


def make(config: OptimizerConfig, learning_rate: optax.Schedule, mesh: Mesh | None) -> optax.GradientTransformation:
    """Makes AdamW with epsilon 1e-8."""
    return optax.adamw(learning_rate, b1=config.b1, b2=config.b2, eps=1e-8, weight_decay=config.weight_decay)
