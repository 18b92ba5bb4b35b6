"""AdamW."""

import optax
from jax.sharding import Mesh

from ttt_e2e.config import OptimizerConfig
from ttt_e2e.model.parameters import Traits
from ttt_e2e.train.optimizers import decay_mask


def make(
    config: OptimizerConfig, learning_rate: optax.Schedule, mesh: Mesh | None, traits: dict[str, Traits]
) -> optax.GradientTransformation:
    """Makes AdamW with epsilon 1e-8."""
    decay = {"weight_decay": config.weight_decay, "mask": decay_mask(traits)}
    return optax.adamw(learning_rate, b1=config.b1, b2=config.b2, eps=1e-8, **decay)
