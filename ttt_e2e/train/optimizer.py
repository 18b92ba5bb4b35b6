"""The outer optimizer: global-norm clip, then AdamW under warm-up and cosine decay."""

import re

import jax
import jax.numpy as jnp
import optax

from ttt_e2e.config import OptimizerConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model.parameters import parameter_name


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Rate at outer step n, counted from 0: the first update has rate 0 where there is a warm-up."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.decay_steps,
        end_value=config.end_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, params) -> optax.GradientTransformation:
    """The gradient transformation for `params` (or their shapes); decays every parameter it trains.

    Raises:
      UserError: `train_only` is no regular expression, or matches no parameter.
    """
    adamw = optax.adamw(
        learning_rate_schedule(config), b1=config.b1, b2=config.b2, eps=1e-8, weight_decay=config.weight_decay
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    optimizer = optax.chain(clip, adamw)
    if not config.train_only:
        return optimizer
    return optax.selective_transform(optimizer, freeze_mask=_frozen(config.train_only, params))


def gradient_norm(gradient):
    """sqrt(sum g^2 + 1e-5), the norm that is logged: that of the released implementation."""
    return jnp.sqrt(optax.tree.norm(gradient, squared=True) + 1e-5)


def _frozen(train_only: str, params):
    try:
        pattern = re.compile(train_only)
    except re.error as error:
        raise UserError(f"config.optimizer.train_only is {train_only!r}, no regular expression: {error}") from None
    frozen = jax.tree_util.tree_map_with_path(lambda path, _: not pattern.search(parameter_name(path)), params)
    if all(jax.tree.leaves(frozen)):
        names = [parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise UserError(
            f"config.optimizer.train_only {train_only!r} matches no parameter; there are {', '.join(names)}"
        )
    return frozen
