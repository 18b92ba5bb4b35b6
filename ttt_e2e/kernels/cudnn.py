"""cuDNN's fused attention, for first-order callers on NVIDIA GPUs (bfloat16 and float16). Not yet run on hardware.

Shapes: `T` positions, `N` query heads, `G` key/value heads, `H` head width.
"""

import jax


def attend(q_TNH, k_TGH, v_TGH, *, window: int, implementation: str = "cudnn"):
    """Attention [T, N, H] of a whole sequence to itself; `implementation="xla"` runs it anywhere, for tests."""
    local = (min(window, q_TNH.shape[0]) - 1, 0) if window else None
    return jax.nn.dot_product_attention(
        q_TNH, k_TGH, v_TGH, is_causal=True, local_window_size=local, implementation=implementation
    )
