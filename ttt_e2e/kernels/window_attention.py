"""The public operation, and the choice of who computes it.

Shapes: `T` queries, `C` cached keys, `S` keys in all, `N` query heads, `G` key/value heads, `R` = N / G, `H` head width.
"""

import jax.numpy as jnp

from ttt_e2e.kernels import primitives, reference


def window_attention(
    q_TNH, k_SGH, v_SGH, *, window: int, num_empty=0, cached_k=None, cached_v=None, backend="auto", first_order=False
):
    """Causal attention of the last T of S positions to the `window` most recent ones, themselves included.
    """
    if backend == "reference":
        if cached_k is not None:
            k_SGH, v_SGH = jnp.concatenate([cached_k, k_SGH]), jnp.concatenate([cached_v, v_SGH])
        return reference.attend(q_TNH, k_SGH, v_SGH, window=window, num_empty=num_empty)
    T, N, H = q_TNH.shape
    G = k_SGH.shape[1]
    q_GRTH = q_TNH.reshape(T, G, N // G, H).transpose(1, 2, 0, 3)
    k_GTH, v_GTH = k_SGH.swapaxes(0, 1), v_SGH.swapaxes(0, 1)
    if cached_k is None:
        cached = k_GTH[:, :0] * 0, v_GTH[:, :0] * 0
        cached = jnp.zeros((G, 0, H), k_SGH.dtype), jnp.zeros((G, 0, v_SGH.shape[-1]), v_SGH.dtype)
    else:
        cached = cached_k.swapaxes(0, 1), cached_v.swapaxes(0, 1)
    num_empty = jnp.asarray(num_empty, jnp.int32)
    out_GRTH = primitives.attend(q_GRTH, *cached, k_GTH, v_GTH, num_empty, window=window, backend="xla")
    return out_GRTH.transpose(2, 0, 1, 3).reshape(T, N, -1)
