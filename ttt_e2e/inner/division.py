"""Divides the reading of a batch among the devices of a mesh, each of which has its own part of every array.

The program runs inside of a `jax.shard_map` over both axes of the mesh. `data`: each device has its own sequences, and
a part of every weight, which it stores for all; a weight is put together before it is used, in the compute dtype, and
its cotangents are added up over the devices in the dtype in which it is stored. `model`: each device has its part of
every matrix and computes with that (model/parts.py); or, in the prefix, its part of the positions, and then whole
matrices (model/sequence_parts.py).

What a loop runs gathers nothing, but for the weights of the prefix: those of one block at a time.

Shapes: `B` sequences of a device, `T` positions of a sequence, `Q` of a device's part of it, `V` vocabulary, `D` model
width.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.parts import AXIS as MODEL
from ttt_e2e.model.parts import copy_to_all, sum_to_all

DATA = "data"


class Leaf(NamedTuple):
    """Layout of one weight: as stored, and as a device computes with it. Dimensions count from the end: -1 or -2."""

    is_matrix: bool = True  # computes in the compute dtype; others, of norms, as they are
    data: int = 0  # dimension that is divided over `data`; 0 = none
    gathered: int = 0  # dimension that is divided over `model`, but whole in the computation; 0 = none
    sums: bool = False  # whether cotangents of what was gathered over `model` are terms of a sum, or all alike
    columns: int = 0  # of a head stored whole, of which each device of `model` computes with its own; 0 = not so
    unsummed: tuple[str, ...] = ()  # axes over which cotangents are still to be added up, once a step


class Weights(NamedTuple):
    """Layouts of a tree of weights; None where nothing is divided."""

    leaves: Any = None
    num_parts: int = 1  # devices of the `model` axis
    compute_dtype: Any = None

    def of(self, *names: str) -> "Weights":
        """The layouts of a part of the tree."""
        leaves = self.leaves
        for name in names if leaves is not None else ():
            leaves = leaves[name]
        return self._replace(leaves=leaves)

    def whole(self, stored):
        """Gathers stored weights into those that this device computes with."""
        return self._map(partial(_whole, self), stored)

    def reduced(self, bars):
        """The transpose of `whole`: cotangents of what is stored, added up over those devices that share it."""
        return self._map(partial(_reduced, self), bars)

    def _map(self, function, tree):
        return tree if self.leaves is None else jax.tree.map(function, tree, self.leaves)


class Division(NamedTuple):
    """Layout of all arrays on a device."""

    slow: Weights = Weights()
    head: Weights = Weights()  # [D, V], be it a weight of its own or the transpose of the embeddings' table
    fast: Weights = Weights()
    num_parts: int = 1  # devices of the `model` axis
    by_sequence: bool = False  # whether the prefix divides positions over `model`, and not matrices


UNDIVIDED = Division()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fetch(weights: Weights, stored):
    """`Weights.whole`, with `Weights.reduced` as its transpose; differentiable once, in reverse."""
    return weights.whole(stored)


def _fetch_forward(weights: Weights, stored):
    return weights.whole(stored), jax.tree.map(lambda w: jnp.zeros((), w.dtype), stored)


def _fetch_reverse(weights: Weights, dtypes, bars):
    return (weights.reduced(jax.tree.map(lambda bar, like: bar.astype(like.dtype), bars, dtypes)),)


fetch.defvjp(_fetch_forward, _fetch_reverse)


def fetch_block(weights: Weights, state):
    """The state of a block, of what this device stores of it."""
    return nnx.State(fetch(weights, nnx.to_pure_dict(state)))


def complete(division: Division, gradient):
    """Adds up over the devices what is left of a gradient {"fast", "slow"} of the stored weights."""

    def add_up(bar, leaf: Leaf):
        return jax.lax.psum(bar, leaf.unsummed) if leaf.unsummed else bar

    return jax.tree.map(add_up, gradient, {"fast": division.fast.leaves, "slow": division.slow.leaves})


def embed(division: Division, table_VD, tokens_BT, vocab_size: int, dtype):
    """Embeddings [B, T, D] of this device's sequences; where the prefix divides them, of its positions [B, Q, D].

    Not the table travels, but what is looked up: every device looks up the tokens of all, in the rows and columns of
    the table that it stores. So the table's cotangents are each device's own.
    """
    leaf: Leaf = division.slow.of("embedding").leaves or Leaf()
    ids = jax.lax.all_gather(tokens_BT, DATA, axis=0, tiled=True) if leaf.data else tokens_BT
    if table_VD.shape[0] < vocab_size:
        row = ids - jax.lax.axis_index(MODEL) * table_VD.shape[0]
        is_here = (row >= 0) & (row < table_VD.shape[0])
        x = jnp.where(is_here[..., None], table_VD[jnp.clip(row, 0, table_VD.shape[0] - 1)].astype(dtype), 0)
        if division.by_sequence:
            x = jax.lax.psum_scatter(x, MODEL, scatter_dimension=1, tiled=True)
        else:
            x = sum_to_all(x, True)
    else:
        if division.by_sequence:
            table_VD, ids = copy_to_all(table_VD, True), own_part(ids, 1, division.num_parts)
        x = table_VD[ids].astype(dtype)
    return jax.lax.all_to_all(x, DATA, 0, 2, tiled=True) if leaf.data else x


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_alike(part, axis: int, num_parts: int):
    """The whole of an array whose dimension `axis` is divided over `model`; its cotangents are alike on all devices."""
    return jax.lax.all_gather(part, MODEL, axis=axis, tiled=True)


gather_alike.defvjp(
    lambda part, axis, num_parts: (gather_alike(part, axis, num_parts), None),
    lambda axis, num_parts, _, bar: (own_part(bar, axis, num_parts),),
)


def own_part(whole, axis: int, num_parts: int):
    """This device's part of a dimension that `model` divides evenly."""
    size = whole.shape[axis] // num_parts
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(MODEL) * size, size, axis)


def _whole(weights: Weights, stored, leaf: Leaf):
    if leaf.is_matrix and weights.compute_dtype is not None:
        stored = stored.astype(weights.compute_dtype)
    for dimension, axis in ((leaf.data, DATA), (leaf.gathered, MODEL)):
        if dimension:
            stored = jax.lax.all_gather(stored, axis, axis=stored.ndim + dimension, tiled=True)
    if leaf.columns:  # filled up with columns of zeros to a multiple of the devices
        filled = jnp.pad(stored, ((0, 0), (0, -leaf.columns % weights.num_parts)))
        stored = own_part(filled, 1, weights.num_parts)
    return stored


def _reduced(weights: Weights, bar, leaf: Leaf):
    if leaf.columns:
        bar = jax.lax.all_gather(bar, MODEL, axis=1, tiled=True)[:, : leaf.columns]
    if leaf.gathered:
        if leaf.sums:
            bar = jax.lax.psum_scatter(bar, MODEL, scatter_dimension=bar.ndim + leaf.gathered, tiled=True)
        else:
            bar = own_part(bar, bar.ndim + leaf.gathered, weights.num_parts)
    if leaf.data:
        bar = jax.lax.psum_scatter(bar, DATA, scatter_dimension=bar.ndim + leaf.data, tiled=True)
    return bar
