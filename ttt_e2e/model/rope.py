"""Rotary position embedding. Shapes: `T` positions, `N` heads, `H` head width, `C` = H / 2 pairs of channels."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ttt_e2e.model.parameters import at_least_float32


class Scaling(NamedTuple):
    """Slower rotations for longer contexts, as Llama 3.1 has them ("llama3")."""

    factor: float  # by which slow rotations are slowed down
    low_freq_factor: float  # rotations that turn less often than this within the original context are slow
    high_freq_factor: float  # those that turn more often than this stay as they are; those in between are interpolated
    original_positions: int  # length of the original context


def rotate(x_NTH, positions_T, *, theta: float, style: str, scaling: Scaling | None = None):
    """Rotates channel pairs [..., T, H] of each head by position * theta^(-2i/H), computed in float32.

    style: "interleaved" pairs adjacent channels (2i, 2i+1); "half" pairs (i, i + H/2), as Hugging Face weights do.
    scaling: of the frequencies; None = none.
    """
    H = x_NTH.shape[-1]
    dtype = at_least_float32(x_NTH.dtype)
    frequencies = theta ** (-jnp.arange(0, H, 2, dtype=dtype) / H)
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    return rotate_by(x_NTH, positions_T.astype(dtype)[:, None] * frequencies, style=style)


def _scaled(frequencies_C, scaling: Scaling):
    """Slows down the frequencies [C] of slow rotations."""
    factor, low, high, original_positions = scaling
    turns = original_positions * frequencies_C / (2 * math.pi)  # within the original context
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequencies_C * (kept + (1 - kept) / factor)


def rotate_by(x_NTH, angles_TC, *, style: str):
    """Rotates channel pairs [..., T, H] by angles; `style` as in `rotate`."""
    cos, sin = jnp.cos(angles_TC), jnp.sin(angles_TC)
    x = x_NTH.astype(angles_TC.dtype)
    if style == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(x, 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.astype(x_NTH.dtype)


def absolute_angles(positions_T, H: int, *, theta: float, dtype):
    """Computes the angles [T, C] of `rotate` modulo a turn, from 0, for positions up to 2^31 - 1.

    In integers modulo 2^32, which are the turn: float32 products would be wrong by 0.06 rad at position 2M. Here the
    frequencies are rounded, by at most 2^-33 turns a position, or 0.0015 rad at position 2M.
    """
    turns_C = theta ** (-np.arange(0, H, 2) / H) / (2 * math.pi)
    steps_C = jnp.asarray(np.round(turns_C * 2**32).astype(np.uint32))
    phase_TC = positions_T.astype(jnp.uint32)[:, None] * steps_C
    return phase_TC.astype(dtype) * (2 * math.pi / 2**32)
