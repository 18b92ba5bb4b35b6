"""How precise matrix products are: as precise as their dtype says, on every platform."""

import contextlib

import jax
import jax.numpy as jnp


@contextlib.contextmanager
def matmul_precision(dtype):
    """Traced inside, products of float32 or float64 arrays are made in that dtype; a context, or a decorator.

    Left to themselves, GPUs round the factors of float32 products to TF32, TPUs to bfloat16. Where `dtype`, in which a
    model computes, is narrower, rounding is what was asked for, and nothing is changed. Taking the gradient has to be
    inside, too: that is when the backward pass of a `custom_vjp` is traced.
    """
    with jax.default_matmul_precision("highest") if jnp.dtype(dtype).itemsize >= 4 else contextlib.nullcontext():
        yield
