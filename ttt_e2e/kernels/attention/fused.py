"""What the fused kernels of others have in common: which arrays they take, and how they are given cached keys.

Shapes: `T` queries, `K` keys before them, `S` = K + T keys in view, `N` query heads, `G` key/value heads,
`H` head width.
"""

import jax
import jax.numpy as jnp

MAX_WIDTH = 128  # of heads


def attend(attend_square, q_NTH, k_GSH, v_GSH, *, window: int, num_empty=0):
    """Attention [N, T, H] of the last T of S positions by a kernel that takes as many queries as keys; and no lse.

    Queries stand at their own places among the keys. Empty keys, the first `num_empty` of the K, move behind the last
    query, where no query sees them. The scores of the K places before the queries are computed for nothing.
    """
    (N, T, H), S = q_NTH.shape, k_GSH.shape[1]
    if S == T:
        return attend_square(q_NTH, k_GSH, v_GSH, window=window), None

    def without_empty(a_GSH):
        return jax.lax.dynamic_slice_in_dim(jnp.pad(a_GSH, ((0, 0), (0, S - T), (0, 0))), num_empty, S, axis=1)

    first = S - T - num_empty
    q_NSH = jax.lax.dynamic_update_slice_in_dim(jnp.zeros((N, S, H), q_NTH.dtype), q_NTH, first, axis=1)
    out_NSH = attend_square(q_NSH, *map(without_empty, (k_GSH, v_GSH)), window=window)
    return jax.lax.dynamic_slice_in_dim(out_NSH, first, T, axis=1), None


def obstacle(problem) -> str:
    """Why these kernels cannot take the arrays; empty where they can."""
    [dtype] = problem.dtypes
    if dtype in ("bfloat16", "float16") and problem.width % 8 == 0 and problem.width <= MAX_WIDTH:
        return ""
    return (
        f"takes bfloat16 or float16 and a head width that is a multiple of 8 up to {MAX_WIDTH}, "
        f"not {dtype} and {problem.width}"
    )
