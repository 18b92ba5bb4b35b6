"""Tensor parallelism over the mesh axis `model`: the two functions by which devices sum what each computes.

The program runs inside of a `jax.shard_map` over all axes of the mesh, and each device has its own part of the
matrices. Where it has columns of one matrix and the same rows of the next (as in Megatron), it computes both products
alone, and the result is one term of a sum over the devices:

    y = sum_to_all(f(copy_to_all(x)))        f: product with the device's own columns, then with its own rows

`x` and `y` are equal on all devices of the axis, and so are their cotangents. `jax.lax.psum` does not assume that: its
transpose is a sum again, which would count each cotangent once per device. The two functions here are each other's
transposes, under every JAX transformation.

`divided`: whether there is anything to sum, which a layer sees by the sizes of its own matrices. If not, both functions
are the identity, and no mesh is needed.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

AXIS = "model"
DATA = "data"


def copy_to_all(x, divided: bool):
    """Returns `x`, for each device to multiply by its own columns; its cotangents are summed over the devices."""
    return _copy_p.bind(x) if divided else x


def sum_to_all(x, divided: bool):
    """Sums `x` over the devices; the cotangent goes to each device unchanged."""
    return _sum_p.bind(x) if divided else x


def _linear(name: str, implementation) -> Primitive:
    """Makes a linear primitive of one array that keeps shape and dtype, and maps over any axis under `vmap`."""
    primitive = Primitive(name)
    primitive.def_impl(implementation)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, mlir.lower_fun(implementation, multiple_results=False))
    batching.primitive_batchers[primitive] = lambda operands, axes: (primitive.bind(*operands), axes[0])
    ad.primitive_jvps[primitive] = lambda primals, tangents: (primitive.bind(*primals), _apply(primitive, *tangents))
    return primitive


def _apply(primitive, tangent):
    """Applies a primitive to a tangent or cotangent, which may be a symbolic zero."""
    return tangent if type(tangent) is ad.Zero else primitive.bind(tangent)


_copy_p = _linear("copy_to_all", lambda x: x)
_sum_p = _linear("sum_to_all", lambda x: jax.lax.psum(x, AXIS))
ad.primitive_transposes |= {
    _copy_p: lambda cotangent, x: [_apply(_sum_p, cotangent)],
    _sum_p: lambda cotangent, x: [_apply(_copy_p, cotangent)],
}
