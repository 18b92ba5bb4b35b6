"""Where every array lives: one table of rules over a mesh of two axes.

Parameters and optimizer state are sharded over both axes (`data`: fully sharded data parallelism, `model`: tensor
parallelism); sequences, and the fast weights that each of them changes, live along `data`.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.config import MeshConfig
from ttt_e2e.errors import UserError

# End of a parameter's name -> mesh axes of its last dimensions. First match wins.
RULES = (
    (r"embedding", ("model", "data")),
    (r"head", ("data", "model")),
    (r"attention\.w[qkv]", ("data", "model")),
    (r"attention\.wo", ("model", "data")),
    (r"mlp\.w[13]", ("data", "model")),
    (r"mlp\.w2", ("model", "data")),
    (r"norm\.weight", (None,)),
)
BATCH = P("data")


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Mesh with axes (data, model) of the devices here, or others; `data=0` takes all that `model` leaves.

    Raises:
      UserError: there are not as many devices as the mesh asks for, or some of several processes' would be left out.
    """
    devices = jax.devices() if devices is None else devices
    data = config.data or len(devices) // config.model
    size = data * config.model
    of_several = len({device.process_index for device in devices}) > 1
    if not 0 < size <= len(devices) or (of_several and size != len(devices)):
        raise UserError(
            f"config.mesh is data={config.data} x model={config.model}, which does not fit {len(devices)} device(s)"
        )
    shape = (data, config.model)
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices[:size])


def parameter_name(path) -> str:
    """Dotted name of a leaf, e.g. "slow.prefix.attention.wq"."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def shardings(tree, mesh: Mesh):
    """A NamedSharding for every leaf of a tree of parameters, or of anything that contains such trees.

    A dimension that its axis does not divide stays whole.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, _spec(path, x.shape, mesh)), tree)


def per_sequence(fast, num_sequences: int, mesh: Mesh):
    """Fast weights with a leading axis over sequences, each living with its sequence.

    Raises where `fast` has leaves that no rule names, as `shardings` does.
    """

    def replicate(path, w):
        matrix_axes = [axis if axis == "model" else None for axis in _spec(path, w.shape, mesh)]
        sharding = NamedSharding(mesh, P("data", *matrix_axes))
        return jax.lax.with_sharding_constraint(jax.numpy.broadcast_to(w, (num_sequences, *w.shape)), sharding)

    return jax.tree_util.tree_map_with_path(replicate, fast)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch this process feeds."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def _spec(path, shape, mesh: Mesh) -> P:
    if math.prod(shape) == 1:
        return P()
    name = parameter_name(path)
    for pattern, axes in RULES:
        if re.search(pattern + "$", name):
            axes = (None,) * (len(shape) - len(axes)) + axes
            return P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True)))
    raise ValueError(f"no sharding rule for {name}")
