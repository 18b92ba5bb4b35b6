"""JAX's splash attention, for first-order callers on TPUs. Run by the tests in interpret mode, not yet on hardware.

Shapes: `T` positions, `N` query heads, `G` key/value heads, `R` = N / G, `H` head width.
"""

import jax
import jax.numpy as jnp

TILE = 128  # the kernel takes multiples of it, in positions and in head width


def attend(q_NTH, k_GTH, v_GTH, *, window: int, interpret: bool = False):
    """Attention [N, T, H] of a whole sequence to itself; `interpret` runs it on any platform, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import, and only TPUs want it

    (N, T, H), (G, _, width), dtype = q_NTH.shape, v_GTH.shape, v_GTH.dtype
    q_GRTH = (q_NTH * H**-0.5).astype(q_NTH.dtype).reshape(G, N // G, T, H)
    q_GRTH, k_GTH, v_GTH = (_pad(_lowered(a)) for a in (q_GRTH, k_GTH, v_GTH))
    padded_T = k_GTH.shape[1]
    band = splash_attention.LocalMask((padded_T, padded_T), (window - 1 if window else None, 0), offset=0)
    kernel = splash_attention.make_splash_mqa_single_device(
        splash_attention.MultiHeadMask([band] * (N // G)), interpret=interpret
    )
    out_GRTH = jax.vmap(kernel)(q_GRTH, k_GTH, v_GTH)[..., :T, :width]
    return out_GRTH.reshape(N, T, width).astype(dtype)


def _lowered(a):
    """TPU kernels have no float16; float32 holds all of it."""
    return a.astype(jnp.float32) if a.dtype == jnp.float16 else a


def _pad(a):
    """Positions and head width, with zeros: keys after the last query are seen by none, zero channels add nothing."""
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, -size % TILE) for size in a.shape[-2:]])
