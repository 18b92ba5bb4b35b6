"""Makes matrix products as precise as their dtype, on every platform."""

import contextlib

import jax
import jax.numpy as jnp


@contextlib.contextmanager
def matmul_precision(dtype):
    """Computes products of float32 or float64 arrays that are traced inside in that dtype. A context, or a decorator.

    By default GPUs round the factors of float32 products to TF32, TPUs to bfloat16. Where `dtype`, in which a model
    computes, is narrower than float32, the default stays. Gradients have to be taken inside, too: that is when the
    backward pass of a `custom_vjp` is traced.
    """
    with jax.default_matmul_precision("highest") if jnp.dtype(dtype).itemsize >= 4 else contextlib.nullcontext():
        yield
