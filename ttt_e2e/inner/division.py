"""Divides the reading of a batch among the devices of a mesh: which part of every array a device has, and its gathers.

The program runs inside of a `jax.shard_map` over both axes of the mesh.

    data    fully sharded data parallelism (FSDP): each device has its own sequences, and stores one shard of every
            weight. A weight is gathered in the compute dtype before use (`all_gather`); its cotangents are summed over
            the devices in the stored dtype, and each device gets its shard of the sum (`psum_scatter`).
    model   tensor parallelism: each device computes with its own part of every matrix (model/parts.py). Or, in the
            prefix, sequence parallelism: it computes its own positions with whole matrices (model/sequence_parts.py).

No loop over mini-batches gathers anything. The loop over prefix blocks gathers the weights of one block at a time.

Shapes: `B` sequences of a device, `T` positions of a sequence, `Q` of a device's part of it, `V` vocabulary, `D` model
width.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.parts import AXIS as MODEL
from ttt_e2e.model.parts import DATA, copy_to_all, sum_to_all


class Leaf(NamedTuple):
    """Layout of one weight: as stored, and as a device computes with it. Dimensions count from the end: -1 or -2."""

    is_cast: bool = True  # whether it is cast to the compute dtype, as matrices are; the weights of norms are not
    data: int = 0  # dimension that is sharded over `data`; 0 = none
    gathered: int = 0  # dimension that is sharded over `model`, and gathered for the computation; 0 = none
    sums: bool = False  # `gathered` only: the devices' cotangents are terms of a sum; otherwise equal on all devices
    head_columns: int = 0  # of a head that is stored whole, though each device of `model` uses its own; 0 = none is
    unsummed: tuple[str, ...] = ()  # axes over which `complete` sums the cotangents, once a step


class Weights(NamedTuple):
    """Layouts of a tree of weights."""

    leaves: Any = None  # tree of `Leaf`; None where nothing is divided
    num_parts: int = 1  # devices of the `model` axis
    compute_dtype: Any = None

    def of(self, *names: str) -> "Weights":
        """Selects the layouts of a part of the tree, by path."""
        leaves = self.leaves
        for name in names if leaves is not None else ():
            leaves = leaves[name]
        return self._replace(leaves=leaves)

    def whole(self, stored):
        """Gathers stored weights (shards) into those that this device computes with, and casts matrices."""
        return self._map(partial(_whole, self), stored)

    def reduced(self, bars):
        """Transposes `whole`: sums the cotangents over the devices, and returns those of the stored shards."""
        return self._map(partial(_reduced, self), bars)

    def _map(self, function, tree):
        return tree if self.leaves is None else jax.tree.map(function, tree, self.leaves)


class Division(NamedTuple):
    """Layouts of all weights, and the division of the prefix."""

    slow: Weights = Weights()
    head: Weights = Weights()  # of [D, V], whether a weight of its own or the transposed embeddings
    fast: Weights = Weights()
    num_parts: int = 1  # devices of the `model` axis
    by_sequence: bool = False  # whether `model` divides positions in the prefix, not matrices


UNDIVIDED = Division()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fetch(weights: Weights, stored):
    """Gathers weights: `Weights.whole`, with `Weights.reduced` as its reverse; differentiable once."""
    return weights.whole(stored)


def _fetch_forward(weights: Weights, stored):
    return weights.whole(stored), jax.tree.map(lambda w: jnp.zeros((), w.dtype), stored)


def _fetch_reverse(weights: Weights, dtypes, bars):
    return (weights.reduced(jax.tree.map(lambda bar, like: bar.astype(like.dtype), bars, dtypes)),)


fetch.defvjp(_fetch_forward, _fetch_reverse)


def fetch_block(weights: Weights, state):
    """Gathers the weights of a block, given as an `nnx.State` of this device's shards."""
    return nnx.State(fetch(weights, nnx.to_pure_dict(state)))


def complete(division: Division, gradient):
    """Completes a gradient {"fast", "slow"} of the stored weights: sums it over the axes that `reduced` left out."""

    def add_up(bar, leaf: Leaf):
        return jax.lax.psum(bar, leaf.unsummed) if leaf.unsummed else bar

    return jax.tree.map(add_up, gradient, {"fast": division.fast.leaves, "slow": division.slow.leaves})


def embed(division: Division, table_VD, tokens_BT, vocab_size: int, dtype):
    """Embeds this device's sequences, [B, T, D]; where the prefix divides positions, its own positions, [B, Q, D].

    Devices exchange embeddings, not the table: each looks up the tokens of all devices in its own shard of the table.
    So the table's cotangents need no sum over devices.
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
    """Gathers an array whose dimension `axis` is divided over `model`; its cotangents must be equal on all devices."""
    return jax.lax.all_gather(part, MODEL, axis=axis, tiled=True)


gather_alike.defvjp(
    lambda part, axis, num_parts: (gather_alike(part, axis, num_parts), None),
    lambda axis, num_parts, _, bar: (own_part(bar, axis, num_parts),),
)


def own_part(whole, axis: int, num_parts: int):
    """Slices this device's part out of a dimension that `model` divides evenly."""
    size = whole.shape[axis] // num_parts
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(MODEL) * size, size, axis)


def _whole(weights: Weights, stored, leaf: Leaf):
    if leaf.is_cast and weights.compute_dtype is not None:
        stored = stored.astype(weights.compute_dtype)
    for dimension, axis in ((leaf.data, DATA), (leaf.gathered, MODEL)):
        if dimension:
            stored = jax.lax.all_gather(stored, axis, axis=stored.ndim + dimension, tiled=True)
    if leaf.head_columns:  # padded with columns of zeros to a multiple of the devices
        padded_head = jnp.pad(stored, ((0, 0), (0, -leaf.head_columns % weights.num_parts)))
        stored = own_part(padded_head, 1, weights.num_parts)
    return stored


def _reduced(weights: Weights, bar, leaf: Leaf):
    if leaf.head_columns:
        bar = jax.lax.all_gather(bar, MODEL, axis=1, tiled=True)[:, : leaf.head_columns]
    if leaf.gathered:
        if leaf.sums:
            bar = jax.lax.psum_scatter(bar, MODEL, scatter_dimension=bar.ndim + leaf.gathered, tiled=True)
        else:
            bar = own_part(bar, bar.ndim + leaf.gathered, weights.num_parts)
    if leaf.data:
        bar = jax.lax.psum_scatter(bar, DATA, scatter_dimension=bar.ndim + leaf.data, tiled=True)
    return bar
