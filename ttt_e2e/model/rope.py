"""Rotary position embedding. Shapes: `T` positions, `N` heads, `H` head width."""

import jax.numpy as jnp

from ttt_e2e.model.parameters import at_least_float32


def rotate(x_NTH, positions_T, *, theta: float, style: str):
    """Rotates channel pairs [..., T, H] of each head by position * theta^(-2i/H), computed in float32.

    style: "interleaved" pairs adjacent channels (2i, 2i+1); "half" pairs (i, i + H/2), as Hugging Face weights do.
    """
    H = x_NTH.shape[-1]
    dtype = at_least_float32(x_NTH.dtype)
    frequencies = theta ** (-jnp.arange(0, H, 2, dtype=dtype) / H)
    angles = positions_T.astype(dtype)[:, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x = x_NTH.astype(dtype)
    if style == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(x, 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.astype(x_NTH.dtype)
