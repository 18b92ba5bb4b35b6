"""The sharding of every array over a mesh of two axes, `data` and `model`, by one table.

Parameters and optimizer state are sharded over both axes (`data`: fully sharded data parallelism, `model`: tensor
parallelism). Sequences are sharded over `data`, and so are the fast weights that each of them adapts. `divide` says how
a step's computation is divided accordingly (inner/division.py).
"""

import math
from functools import partial

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.config import Config, MeshConfig, ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.inner.division import DATA, MODEL, Division, Leaf, Weights
from ttt_e2e.model import parameter_traits
from ttt_e2e.model.parameters import Traits, parameter_name

# Logical axis of a parameter (`Traits`) -> mesh axis that divides it.
MESH_AXES = {"width": DATA, "vocabulary": MODEL, "heads": MODEL, "mlp": MODEL, "head_width": None, None: None}
MESH_AXES |= {"rows": MODEL, "columns": DATA}
BATCH = P("data")


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The mesh, with axes (data, model), of `devices`; by default, of all that JAX has.

    `config.data` 0 means the number of devices divided by `config.model`.

    Raises:
      UserError: the mesh needs more devices than there are, or leaves some out where several processes run.
    """
    devices = jax.devices() if devices is None else devices
    data = config.data or len(devices) // config.model
    size = data * config.model
    of_several = len({device.process_index for device in devices}) > 1
    if not 0 < size <= len(devices) or (of_several and size != len(devices)):
        raise UserError(
            f"config.mesh is data={config.data} x model={config.model}, which does not fit {len(devices)} device(s)"
        )
    # Axes of a TPU slice may be split: 16 x 2 is a mesh of a 4 x 8 torus, too.
    placed = create_device_mesh((data, config.model), devices[:size], allow_split_physical_axes=True)
    return Mesh(placed, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def shardings(tree, mesh: Mesh, model: ModelConfig):
    """A NamedSharding for every leaf of a tree of parameters, or of a tree that contains such trees (optimizer state).

    A dimension whose size its mesh axis does not divide is replicated; so are leaves that are no parameters.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree, mesh, model))


def partition_specs(tree, mesh: Mesh, model: ModelConfig):
    """A PartitionSpec for every leaf of such a tree, by the rules of `shardings`."""
    traits = parameter_traits(model)

    def spec(path, x):
        of_leaf = _traits_of(path, traits)
        return _spec(of_leaf.axes if of_leaf else (), x.shape, mesh)

    return jax.tree_util.tree_map_with_path(spec, tree)


def with_shardings(shapes, placed):
    """A tree of `jax.ShapeDtypeStruct`s with shardings, from a tree of shapes or arrays.

    placed: a sharding for each leaf, or one for all leaves.
    """

    def place(sharding, shapes):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

    return jax.tree.map(place, placed, shapes)


def divide(config: Config, params, mesh: Mesh, *, by_sequence: bool) -> Division:
    """The `Division` of the weights {"fast", "slow"}: which part of each a device stores, and which it computes with.

    by_sequence: whether the axis `model` divides the prefix's positions, rather than its matrices.
    """
    model, num_parts = config.model, mesh.shape[MODEL]
    all_traits = parameter_traits(model)

    def leaf(path, x):
        traits = _traits_of(path, all_traits)
        spec = P(*(axis if axis and mesh.shape[axis] > 1 else None for axis in _spec(traits.axes, x.shape, mesh)))
        return _leaf(parameter_name(path), traits, spec, model, num_parts, by_sequence)

    leaves = jax.tree_util.tree_map_with_path(leaf, params)
    head = leaves["slow"].get("head") or _transposed(leaves["slow"]["embedding"])
    if num_parts > 1 and model.vocab_size % num_parts:
        head = head._replace(head_columns=model.vocab_size)
    weights = partial(Weights, num_parts=num_parts, compute_dtype=jax.numpy.dtype(model.compute_dtype))
    return Division(
        slow=weights(leaves["slow"]),
        head=weights(head),
        fast=Weights(leaves["fast"], num_parts),
        num_parts=num_parts,
        by_sequence=by_sequence,
    )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Indices of the rows of a global batch that this process's devices hold."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def _leaf(name: str, traits: Traits, spec: P, model: ModelConfig, num_parts: int, by_sequence: bool) -> Leaf:
    """The `Leaf` of a parameter: its name, its traits, and the PartitionSpec that it is stored by."""
    place = {axis: i - len(spec) for i, axis in enumerate(spec) if axis}
    data, divided = place.get(DATA, 0), place.get(MODEL, 0)
    leaf = Leaf(traits.is_cast, data, unsummed=() if data else (DATA,))
    if "columns" in traits.axes:  # looked up where it is: neither gathered, nor are its cotangents scattered
        return leaf._replace(data=0)
    whole = leaf._replace(gathered=divided)
    if by_sequence and name.startswith("slow.prefix"):  # each device has other positions: all cotangents are terms
        return whole._replace(sums=True, unsummed=leaf.unsummed + (() if divided else (MODEL,)))
    if by_sequence and not model.num_fast_blocks and name == "slow.final_norm.weight":
        return leaf._replace(unsummed=(*leaf.unsummed, MODEL))
    if num_parts > 1 and ("heads" in traits.axes or "head_width" in traits.axes):
        if traits.num_heads % num_parts:
            return whole
        if "head_width" in traits.axes:  # each device has other heads
            return leaf._replace(unsummed=(*leaf.unsummed, MODEL))
    return leaf


def _transposed(leaf: Leaf) -> Leaf:
    """The `Leaf` of the transpose of a matrix, from that of the matrix."""
    return leaf._replace(data=-3 - leaf.data if leaf.data else 0)


def _traits_of(path, traits: dict[str, Traits]) -> Traits | None:
    """The traits of the parameter whose name ends a leaf's path; None if none does: it is the optimizer's own state."""
    keys = parameter_name(path).split(".")
    begin = next((i for i, key in enumerate(keys) if key in ("fast", "slow")), len(keys))
    if begin == len(keys):
        return None
    if (name := ".".join(keys[begin:])) not in traits:
        raise ValueError(f"{name} is no parameter of the model, and so has no sharding")
    return traits[name]


def _spec(axes: tuple, shape, mesh: Mesh) -> P:
    """The PartitionSpec of an array with these logical axes; dimensions in front of them (blocks) are not divided."""
    mesh_axes = (None,) * (len(shape) - len(axes)) + tuple(MESH_AXES[axis] for axis in axes)
    if not axes or math.prod(shape) == 1 or len(mesh_axes) != len(shape):
        return P()
    return P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(mesh_axes, shape, strict=True)))
