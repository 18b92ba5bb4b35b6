"""Optimizers of the outer loop: global-norm clip, then the optimizer `optimizer.name`, under warm-up and cosine decay.

Each file of this directory is an optimizer, and `optimizer.name` is the name of its file. It has a function

    make(config: OptimizerConfig, learning_rate: optax.Schedule, mesh: Mesh | None, traits: dict[str, Traits])
      -> optax.GradientTransformation

for trees {"fast", "slow"} of parameters; `train_only` leaves `optax.MaskedNode` in the place of those that are frozen.
It gives `decay_mask(traits)` to the transformation that decays weights. Factors on the learning rate are applied here.
Optimizer state that has the shapes of the parameters is sharded as they are; other state is replicated on every device.
"""

import importlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ttt_e2e.config import ModelConfig, OptimizerConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model import parameter_traits
from ttt_e2e.model.parameters import Traits, parameter_name


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Makes the schedule: outer step, from 0 -> learning rate. With a warm-up, the first update has rate 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.decay_steps,
        end_value=config.end_learning_rate,
    )


def make_optimizer(
    config: OptimizerConfig, params, model: ModelConfig, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Makes the gradient transformation for `params` (or their shapes), the parameters of `model`.

    mesh: that of the training step. It changes the communication of an update, not its values.

    Raises:
      UserError: `train_only` is no regular expression, or matches no parameter.
    """
    make, traits = importlib.import_module(f"{__name__}.{config.name}").make, parameter_traits(model)
    traits = {
        name: of_leaf._replace(rate=of_leaf.rate * (config.fast_rate if ".fast_mlp" in name else 1))
        for name, of_leaf in traits.items()
    }
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    parts = [clip, make(config, learning_rate_schedule(config), mesh, traits)]
    if any(of_leaf.rate != 1 for of_leaf in traits.values()):
        parts.append(optax.stateless(lambda updates, _: _by_rate(updates, traits)))
    optimizer = optax.chain(*parts)
    if not config.train_only:
        return optimizer
    return optax.selective_transform(optimizer, freeze_mask=_frozen(config.train_only, params))


def gradient_norm(gradient):
    """Computes sqrt(sum g^2 + 1e-5), the norm that is logged, as the released implementation does."""
    return jnp.sqrt(optax.tree.norm(gradient, squared=True) + 1e-5)


def decay_mask(traits: dict[str, Traits]):
    """Makes the mask for optax by which weight decay applies to those parameters that it should; None = to all."""
    if all(of_leaf.decays for of_leaf in traits.values()):
        return None
    return partial(jax.tree_util.tree_map_with_path, lambda path, _: traits[parameter_name(path)].decays)


def _by_rate(updates, traits: dict[str, Traits]):
    """Multiplies updates by their parameters' factors on the learning rate."""
    return jax.tree_util.tree_map_with_path(lambda path, u: traits[parameter_name(path)].rate * u, updates)


def _frozen(train_only: str, params):
    """Marks the parameters whose names `train_only` does not match, as a tree of bool."""
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
