"""Muon for the matrices of the blocks, AdamW for embedding, head, norms and what else there is.

Shapes: `L` blocks of a stack.
"""

import math
from functools import partial

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.config import OptimizerConfig
from ttt_e2e.model.parameters import Traits, parameter_name
from ttt_e2e.train.optimizers import decay_mask

AXES = ((), ("data",), ("model",), ("data", "model"))
MOMENTUM = 0.95
ROOT_MEAN_SQUARE = 0.2  # of an update: about AdamW's, so that its learning rates serve (arXiv 2502.16982)


def make(
    config: OptimizerConfig, learning_rate: optax.Schedule, mesh: Mesh | None, traits: dict[str, Traits]
) -> optax.GradientTransformation:
    """Makes Muon for matrices [L, in, out] from or to hidden states, and AdamW for others."""
    decay = {"weight_decay": config.weight_decay, "mask": decay_mask(traits)}

    def label(path, x):
        axes = traits[parameter_name(path)].axes
        return "muon" if x.ndim == 3 and len(axes) == 2 and "width" in axes else "adamw"

    muon = optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.stateless(lambda updates, _: _orthogonalize(updates, mesh)),
        optax.add_decayed_weights(**decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    adamw = optax.adamw(learning_rate, b1=config.b1, b2=config.b2, eps=1e-8, **decay)
    return optax.partition({"muon": muon, "adamw": adamw}, partial(jax.tree_util.tree_map_with_path, label))


def _orthogonalize(updates, mesh: Mesh | None):
    """Orthogonalizes the matrix of each block, [L, in, out], and scales it to ROOT_MEAN_SQUARE.

    For that, a device gets whole matrices of some blocks. Without this, the compiler exchanges parts of matrices in
    each product of the Newton-Schulz iteration: a device would receive 107 GiB in a step of 3b-e2e-8k on 8 devices.
    """
    newton_schulz = optax.contrib.scale_by_muon(
        beta=0.0,  # `updates` have their momentum from `optax.trace`
        nesterov=False,
        weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), tree),
    )
    updates = jax.tree.map(lambda x: _whole_matrices(x, mesh), updates)
    updates, _ = newton_schulz.update(updates, newton_schulz.init(updates))
    return jax.tree.map(lambda x: ROOT_MEAN_SQUARE * math.sqrt(max(x.shape[-2:])) * _whole_matrices(x, mesh), updates)


def _whole_matrices(x_L, mesh: Mesh | None):
    """Shards a stack [L, ...] over L, by the mesh axes with the most devices that divide L: each has whole matrices."""
    if mesh is None:
        return x_L

    def num_devices(axes) -> int:
        return math.prod(mesh.shape[axis] for axis in axes)

    axes = max((axes for axes in AXES if len(x_L) % num_devices(axes) == 0), key=num_devices)
    return jax.lax.with_sharding_constraint(x_L, NamedSharding(mesh, P(axes or None)))
