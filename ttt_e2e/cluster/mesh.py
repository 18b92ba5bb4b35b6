"""Where every array lives: one table of rules over a mesh of two axes.

Parameters and optimizer state are sharded over both axes (`data`: fully sharded data parallelism, `model`: tensor
parallelism); sequences, and the fast weights that each of them changes, live along `data`. `divide` says what that
means for the computation of a step (inner/division.py).
"""

import math
import re
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.config import Config, MeshConfig, ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.inner.division import DATA, MODEL, Division, Leaf, Weights
from ttt_e2e.model.parameters import parameter_name

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


def shardings(tree, mesh: Mesh):
    """A NamedSharding for every leaf of a tree of parameters, or of anything that contains such trees.

    A dimension that its axis does not divide stays whole.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, mesh))


def partition_specs(tree, mesh: Mesh):
    """As `shardings`: a PartitionSpec for every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, x: _spec(path, x.shape, mesh), tree)


def with_shardings(shapes, placed):
    """A tree of shapes, or of arrays, as `jax.ShapeDtypeStruct`s that say where each is to live.

    placed: a sharding for each leaf, or one for all leaves.
    """

    def place(sharding, shapes):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

    return jax.tree.map(place, placed, shapes)


def divide(config: Config, params, mesh: Mesh, *, by_sequence: bool) -> Division:
    """What each device of the mesh stores of the weights {"fast", "slow"}, and what it computes with.

    by_sequence: whether the prefix divides positions over `model`, and not matrices.
    """
    model, num_parts = config.model, mesh.shape[MODEL]

    def leaf(path, x):
        spec = P(*(axis if axis and mesh.shape[axis] > 1 else None for axis in _spec(path, x.shape, mesh)))
        return _leaf(parameter_name(path), spec, model, num_parts, by_sequence)

    leaves = jax.tree_util.tree_map_with_path(leaf, params)
    head = leaves["slow"].get("head") or _transposed(leaves["slow"]["embedding"])
    if num_parts > 1 and model.vocab_size % num_parts:
        head = head._replace(columns=model.vocab_size)
    weights = partial(Weights, num_parts=num_parts, compute_dtype=jax.numpy.dtype(model.compute_dtype))
    return Division(
        slow=weights(leaves["slow"]),
        head=weights(head),
        fast=Weights(leaves["fast"], num_parts),
        num_parts=num_parts,
        by_sequence=by_sequence,
    )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch this process feeds."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def _leaf(name: str, spec: P, model: ModelConfig, num_parts: int, by_sequence: bool) -> Leaf:
    """Of a weight that is stored as `spec` says."""
    place = {axis: i - len(spec) for i, axis in enumerate(spec) if axis}
    data, divided = place.get(DATA, 0), place.get(MODEL, 0)
    leaf = Leaf(not name.endswith("norm.weight"), data, unsummed=() if data else (DATA,))
    whole = leaf._replace(gathered=divided)
    if by_sequence and name.startswith("slow.prefix."):  # each device has other positions: all cotangents are terms
        return whole._replace(sums=True, unsummed=leaf.unsummed + (() if divided else (MODEL,)))
    if by_sequence and not model.num_fast_blocks and name == "slow.final_norm.weight":
        return leaf._replace(unsummed=(*leaf.unsummed, MODEL))
    if num_parts > 1 and ".attention." in name:
        if model.num_key_value_heads % num_parts:
            return whole
        if name.endswith((".q_norm.weight", ".k_norm.weight")):  # each device has other heads
            return leaf._replace(unsummed=(*leaf.unsummed, MODEL))
    return leaf


def _transposed(leaf: Leaf) -> Leaf:
    """Of a matrix of two dimensions, of its transpose."""
    return leaf._replace(data=-3 - leaf.data if leaf.data else 0)


def _spec(path, shape, mesh: Mesh) -> P:
    if math.prod(shape) == 1:
        return P()
    name = parameter_name(path)
    for pattern, axes in RULES:
        if re.search(pattern + "$", name):
            axes = (None,) * (len(shape) - len(axes)) + axes
            return P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True)))
    raise ValueError(f"no sharding rule for {name}")
