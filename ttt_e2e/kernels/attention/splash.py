"""JAX's splash attention, for callers on TPUs that differentiate once. Tests interpret it; no hardware has run it.

Shapes: `T` queries, `S` keys in view, `N` query heads, `G` key/value heads, `R` = N / G, `H` head width.
"""

import jax
import jax.numpy as jnp

from ttt_e2e.kernels.attention import fused

TILE = 128  # the kernel takes multiples of it, in positions and in head width
# Positions of a block of queries, or of keys: the largest that divides the sequence. With blocks of one tile, the list
# of blocks of a causal mask of 131072 positions would take 2 MiB of scalar memory, of which a TPU has 1 MiB.
BLOCKS = (512, 256, TILE)

obstacle = fused.obstacle


def attend(q_NTH, k_GSH, v_GSH, *, window: int, num_empty=0):
    """Attention [N, T, H] of the last T of S positions, and no lse."""
    return fused.attend(attend_square, q_NTH, k_GSH, v_GSH, window=window, num_empty=num_empty)


def attend_square(q_NTH, k_GTH, v_GTH, *, window: int, interpret: bool = False):
    """Attention [N, T, H] of a whole sequence to itself; `interpret` runs it on any platform, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import, and only TPUs want it

    (N, T, H), (G, _, width), dtype = q_NTH.shape, v_GTH.shape, v_GTH.dtype
    q_GRTH = (q_NTH * H**-0.5).astype(q_NTH.dtype).reshape(G, N // G, T, H)
    q_GRTH, k_GTH, v_GTH = (_pad(_lowered(a)) for a in (q_GRTH, k_GTH, v_GTH))
    padded_T = k_GTH.shape[1]
    band = splash_attention.LocalMask((padded_T, padded_T), (window - 1 if window else None, 0), offset=0)
    kernel = splash_attention.make_splash_mqa_single_device(
        splash_attention.MultiHeadMask([band] * (N // G)), block_sizes=_block_sizes(padded_T), interpret=interpret
    )
    out_GRTH = jax.vmap(kernel)(q_GRTH, k_GTH, v_GTH)[..., :T, :width]
    return out_GRTH.reshape(N, T, width).astype(dtype)


def _block_sizes(T: int):
    """The blocks of all three kernels (forward, gradient of queries, of keys and values) for T positions."""
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

    size = next(block for block in BLOCKS if T % block == 0)
    return BlockSizes(
        **{f"block_{name}": size for name in ("q", "q_dkv", "q_dq", "kv", "kv_dkv", "kv_dq")},
        block_kv_compute=size,
        block_kv_dkv_compute=size,
    )


def _lowered(a):
    """The array in float32 where it is float16, a dtype that TPU kernels lack."""
    return a.astype(jnp.float32) if a.dtype == jnp.float16 else a


def _pad(a):
    """Pads positions and head width to multiples of `TILE` with zeros, which change no result.

    Padded keys come after the last query, so that none sees them; padded channels add nothing to a score.
    """
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, -size % TILE) for size in a.shape[-2:]])
