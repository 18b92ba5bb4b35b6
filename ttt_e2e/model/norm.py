"""RMS normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.parameters import at_least_float32


class RMSNorm(nnx.Module):
    """Normalises the last axis by its root mean square and multiplies by a weight, in float32; casts back after."""

    def __init__(self, size: int, config):
        self.weight = nnx.Param(jnp.ones(size, jnp.dtype(config.param_dtype)))
        self.eps = config.rms_norm_eps

    def __call__(self, x):
        """`x` [..., size], normalised, in the dtype it came in."""
        wide = x.astype(at_least_float32(x.dtype))
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * self.weight[...]).astype(x.dtype)
