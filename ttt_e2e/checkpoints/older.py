"""Reads checkpoints of an older layout, in which the blocks of all mixers of a pattern were in one stack.

Prefix and suffix had one stack each, "prefix" and "suffix", whose block i had mixer i modulo the number of mixers. Now
each mixer of a pattern has its own stacks, "prefix_0", "prefix_1", ...; patterns of a single mixer keep the old layout.

Shapes: `L` blocks of a stack.
"""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from ttt_e2e.checkpoints.restore import stored_shapes
from ttt_e2e.model.parameters import parameter_name

STACK = re.compile(r"\b(prefix|suffix)_(\d+)\b")  # model/stacks.py


def as_saved(path, abstract):
    """Shapes to restore the item at `path` with: `abstract`, or if the item is older, the same in its layout."""
    if not _count_mixers(abstract) or any(STACK.search(name) for name in stored_shapes(path)):
        return abstract
    return one_stack(abstract, interleaved_shape)


def as_wanted(arrays, abstract):
    """Converts arrays that were restored with the shapes of `as_saved` to the stacks and shardings of `abstract`."""
    if jax.tree.structure(arrays) == jax.tree.structure(abstract):
        return arrays
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(partial(by_mixer, count=_count_mixers(abstract)), out_shardings=placed)(arrays)


def one_stack(tree, combine: Callable):
    """Merges the stacks of prefix and of suffix into one each: "prefix_0", "prefix_1" -> "prefix".

    combine: (one leaf of each stack) -> merged leaf: `interleave`, or `interleaved_shape`.
    """

    def join(node):
        if not isinstance(node, dict):
            return node
        joined, parts = {}, {}
        for name in sorted(node, key=_place):
            if match := STACK.fullmatch(name):
                parts.setdefault(match[1], []).append(node[name])
            else:
                joined[name] = node[name]
        return joined | {part: jax.tree.map(combine, *stacks) for part, stacks in parts.items()}

    return jax.tree.map(join, tree, is_leaf=_has(STACK.fullmatch))


def interleave(*stacks_L):
    """Merges stacks whose blocks run in turns, each [L, ...], into one in the order in which the blocks run."""
    return jnp.stack(stacks_L, axis=1).reshape(-1, *stacks_L[0].shape[1:])


def interleaved_shape(*stacks_L) -> jax.ShapeDtypeStruct:
    """The shape, with its sharding, of what `interleave` makes of arrays of these shapes."""
    first, count = stacks_L[0], sum(stack.shape[0] for stack in stacks_L)
    return jax.ShapeDtypeStruct((count, *first.shape[1:]), first.dtype, sharding=getattr(first, "sharding", None))


def by_mixer(tree, count: int, axis: int = 0):
    """Divides "prefix" and "suffix" into the stacks of `count` mixers: the inverse of `one_stack` with `interleave`.

    axis: of the arrays, along which the blocks are.
    """

    def divide(node):
        if not isinstance(node, dict):
            return node
        divided = {name: value for name, value in node.items() if name not in ("prefix", "suffix")}
        for part in node.keys() - divided.keys():
            for i in range(count):
                every = (slice(None),) * axis + (slice(i, None, count),)
                divided[f"{part}_{i}"] = jax.tree.map(lambda a, every=every: a[every], node[part])
        return divided

    return tree if count == 1 else jax.tree.map(divide, tree, is_leaf=_has(("prefix", "suffix").__contains__))


def _count_mixers(abstract) -> int:
    """Number of stacks of prefix or suffix; 0 if stacks are not numbered."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    numbers = [int(match[2]) for path, _ in leaves if (match := STACK.search(parameter_name(path)))]
    return max(numbers, default=-1) + 1


def _has(is_stack: Callable):
    """A predicate: is a node of a tree a dict with a name that `is_stack` accepts?"""
    return lambda node: isinstance(node, dict) and any(isinstance(name, str) and is_stack(name) for name in node)


def _place(name: str):
    """Sort key of a name: orders stacks by their number."""
    part, _, number = name.rpartition("_")
    return (part, int(number)) if STACK.fullmatch(name) else (name, 0)
