"""Sums over the mesh axis `model`, for a program that each device runs on its own part of the matrices.

Such a program runs inside of a `jax.shard_map` over all axes of the mesh. Where a device has columns of one matrix and
the same rows of the next, both products are its own, and what they give is one term of a sum over the devices:

    y = sum_to_all(f(copy_to_all(x)))        f: the device's own columns, then its own rows

`x` and `y` are alike on all devices of the axis, and so are their cotangents. `jax.lax.psum` cannot know that (its
transpose is a sum, too). These two transpose to each other, under every transformation.

`divided`: whether there is anything to sum. A layer sees it by the sizes of its own matrices; both functions are the
identity otherwise, and no mesh is needed.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

AXIS = "model"


def copy_to_all(x, divided: bool):
    """`x`, which each device is to multiply by its own columns: the cotangents are summed over the devices."""
    return _copy_p.bind(x) if divided else x


def sum_to_all(x, divided: bool):
    """The sum of `x` over the devices; each device takes the cotangent as it is."""
    return _sum_p.bind(x) if divided else x


def _linear(name: str, implementation) -> Primitive:
    """A primitive of one array that is linear, elementwise as far as `vmap` is concerned, and keeps shape and dtype."""
    primitive = Primitive(name)
    primitive.def_impl(implementation)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, mlir.lower_fun(implementation, multiple_results=False))
    batching.primitive_batchers[primitive] = lambda operands, axes: (primitive.bind(*operands), axes[0])
    ad.primitive_jvps[primitive] = lambda primals, tangents: (primitive.bind(*primals), _apply(primitive, *tangents))
    return primitive


def _apply(primitive, tangent):
    return tangent if type(tangent) is ad.Zero else primitive.bind(tangent)


_copy_p = _linear("copy_to_all", lambda x: x)
_sum_p = _linear("sum_to_all", lambda x: jax.lax.psum(x, AXIS))
ad.primitive_transposes |= {
    _copy_p: lambda cotangent, x: [_apply(_sum_p, cotangent)],
    _sum_p: lambda cotangent, x: [_apply(_copy_p, cotangent)],
}
