"""cuDNN's fused attention, for first-order callers on NVIDIA GPUs (bfloat16 and float16). Not yet run on hardware.

Shapes: `T` positions, `N` query heads, `G` key/value heads, `H` head width.
"""

import jax


def attend(q_NTH, k_GTH, v_GTH, *, window: int, implementation: str = "cudnn"):
    """Attention [N, T, H] of a whole sequence to itself; `implementation="xla"` runs it anywhere, for tests."""
    local = (min(window, q_NTH.shape[1]) - 1, 0) if window else None
    by_position = (a.swapaxes(0, 1) for a in (q_NTH, k_GTH, v_GTH))  # the layout of JAX's entry point
    return jax.nn.dot_product_attention(
        *by_position, is_causal=True, local_window_size=local, implementation=implementation
    ).swapaxes(0, 1)
