"""Layouts of before each mixer of a pattern had its own stack of blocks: one stack for each part of the model.

Block i of "prefix" and of "suffix" was then of mixer i modulo their number. Patterns of one mixer have that layout
still.

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
    """Shapes of an item at `path`: those of `abstract`, or where it is older, of one stack for each part."""
    if not _count_mixers(abstract) or any(STACK.search(name) for name in stored_shapes(path)):
        return abstract
    return one_stack(abstract, interleaved_shape)


def as_wanted(arrays, abstract):
    """What `as_saved` had restored, with the stacks and shardings of `abstract`."""
    if jax.tree.structure(arrays) == jax.tree.structure(abstract):
        return arrays
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(partial(by_mixer, count=_count_mixers(abstract)), out_shardings=placed)(arrays)


def one_stack(tree, combine: Callable):
    """A tree in which the stacks of a part are one: "prefix_0", "prefix_1" -> "prefix".

    combine: leaves of those stacks -> a leaf; for example `interleave`, or `interleaved_shape`.
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
    """Blocks of stacks that took turns, in the order in which they ran."""
    return jnp.stack(stacks_L, axis=1).reshape(-1, *stacks_L[0].shape[1:])


def interleaved_shape(*stacks_L) -> jax.ShapeDtypeStruct:
    """The shape that `interleave` gives, of shapes; with their sharding."""
    first, count = stacks_L[0], sum(stack.shape[0] for stack in stacks_L)
    return jax.ShapeDtypeStruct((count, *first.shape[1:]), first.dtype, sharding=getattr(first, "sharding", None))


def by_mixer(tree, count: int, axis: int = 0):
    """The inverse of `one_stack` by `interleave`, for arrays: the stacks of `count` mixers, whose blocks lie along
    `axis`."""

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
    """How many stacks a part has; 0 where they are not numbered."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    numbers = [int(match[2]) for path, _ in leaves if (match := STACK.search(parameter_name(path)))]
    return max(numbers, default=-1) + 1


def _has(is_stack: Callable):
    return lambda node: isinstance(node, dict) and any(isinstance(name, str) and is_stack(name) for name in node)


def _place(name: str):
    """Sorts stacks by their number."""
    part, _, number = name.rpartition("_")
    return (part, int(number)) if STACK.fullmatch(name) else (name, 0)
