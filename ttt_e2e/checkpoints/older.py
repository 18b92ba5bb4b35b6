"""Layouts of before each mixer of a pattern had its own stack of blocks: one stack for each part of the model.

Block i of "prefix" and of "suffix" was then of mixer i modulo their number. Patterns of one mixer have
that layout still.

Shapes: `L` blocks of a stack.
"""

import re

import jax

STACK = re.compile(r"(prefix|suffix)_(\d+)")  # model/stacks.py


def one_stack(tree):
    """Shapes, or anything with the structure, of a tree in which stacks were one: "prefix_0", "prefix_1" -> "prefix".

    Lengths are summed along the leading axis, as those of parameters are; of a tree with other axes in front, only the
    structure is right.
    """

    def join(node):
        if not isinstance(node, dict):
            return node
        joined, parts = {}, {}
        for name, value in node.items():
            if match := STACK.fullmatch(name):
                parts.setdefault(match[1], []).append(value)
            else:
                joined[name] = value
        return joined | {part: jax.tree.map(_sum_of_lengths, *stacks) for part, stacks in parts.items()}

    return jax.tree.map(join, tree, is_leaf=_has(STACK.fullmatch))


def by_mixer(tree, count: int, axis: int = 0):
    """The inverse, for arrays: of each part the stacks of `count` mixers, whose blocks lie along `axis`."""

    def divide(node):
        if not isinstance(node, dict) or count == 1:
            return node
        divided = {}
        for name, value in node.items():
            if name in ("prefix", "suffix"):
                for i in range(count):
                    every = (slice(None),) * axis + (slice(i, None, count),)
                    divided[f"{name}_{i}"] = jax.tree.map(lambda a, every=every: a[every], value)
            else:
                divided[name] = value
        return divided

    return jax.tree.map(divide, tree, is_leaf=_has(lambda name: name in ("prefix", "suffix")))


def _has(is_stack):
    return lambda node: isinstance(node, dict) and any(is_stack(name) for name in node if isinstance(name, str))


def _sum_of_lengths(*leaves):
    first = leaves[0]
    shape = (sum(leaf.shape[0] for leaf in leaves), *first.shape[1:])
    return jax.ShapeDtypeStruct(shape, first.dtype, sharding=getattr(first, "sharding", None))
