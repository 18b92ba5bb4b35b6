"""cuDNN's fused attention, for callers on NVIDIA GPUs that differentiate once. Not yet run on hardware.

Shapes: `T` queries, `S` keys in view, `N` query heads, `G` key/value heads, `H` head width.
"""

import jax

from ttt_e2e.kernels.attention import fused

obstacle = fused.obstacle


def attend(q_NTH, k_GSH, v_GSH, *, window: int, num_empty=0):
    """Attention [N, T, H] of the last T of S positions, and no lse."""
    return fused.attend(attend_square, q_NTH, k_GSH, v_GSH, window=window, num_empty=num_empty)


def attend_square(q_NTH, k_GTH, v_GTH, *, window: int, implementation: str = "cudnn"):
    """Attention [N, T, H] of a whole sequence to itself; `implementation="xla"` runs it anywhere, for tests."""
    local = (min(window, q_NTH.shape[1]) - 1, 0) if window else None
    by_position = (a.swapaxes(0, 1) for a in (q_NTH, k_GTH, v_GTH))  # [T, heads, H], which JAX's entry point takes
    return jax.nn.dot_product_attention(
        *by_position, is_causal=True, local_window_size=local, implementation=implementation
    ).swapaxes(0, 1)
