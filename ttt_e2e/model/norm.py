"""RMS normalisation."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.parameters import at_least_float32, vector


class RMSNorm(nnx.Module):
    """Normalises the last axis by its root mean square and multiplies by a weight, in float32; casts back after."""

    def __init__(self, size: int, config, axis: str | None = None):
        self.weight = vector(jnp.ones(size), config, axis)
        self.eps = config.rms_norm_eps

    def __call__(self, x):
        """`x` [..., size], normalised, in the dtype it came in."""
        return _normed(x, self.weight[...], self.eps)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _normed(x, weight, eps):
    """RMSNorm, rematerialised: its residuals would be several arrays wider than x, and it costs little."""
    wide = x.astype(at_least_float32(x.dtype))
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + eps) * weight).astype(x.dtype)
