"""Window attention over the dense score matrix: the reference that the backend "xla" is tested against.

Shapes: `T` queries, `S` keys, `N` query heads, `G` key/value heads, `R` = N / G, `H` head width.
"""

import jax
import jax.numpy as jnp

# Finite, unlike finfo.min and -inf: with those the second derivative of a softmax is NaN.
MASKED_SCORE = -1e30


def visible_keys(num_queries: int, num_keys: int, window: int, num_empty=0):
    """Boolean [T, S]: query i (at key position i + S - T) sees key j where 0 <= i - j < window and j is not empty."""
    query_T = jnp.arange(num_queries)[:, None] + (num_keys - num_queries)
    key_S = jnp.arange(num_keys)[None, :]
    visible_TS = (key_S <= query_T) & (key_S >= num_empty)
    return visible_TS & (query_T - key_S < window) if window else visible_TS


def attend(q_NTH, k_GSH, v_GSH, *, window: int, num_empty=0):
    """Softmax attention [N, T, H] and its lse [N, T]; scores and their statistics in float32 or wider."""
    N, T, H = q_NTH.shape
    G, S, _ = k_GSH.shape
    q_GRTH = q_NTH.reshape(G, N // G, T, H)
    wide = jnp.promote_types(q_NTH.dtype, jnp.float32)
    scores_GRTS = jnp.einsum("grth,gsh->grts", q_GRTH, k_GSH, preferred_element_type=wide) * H**-0.5
    scores_GRTS = jnp.where(visible_keys(T, S, window, num_empty), scores_GRTS, MASKED_SCORE)
    weights_GRTS = jax.nn.softmax(scores_GRTS, axis=-1).astype(v_GSH.dtype)
    out_NTH = jnp.einsum("grts,gsh->grth", weights_GRTS, v_GSH).reshape(N, T, -1)
    return out_NTH, jax.nn.logsumexp(scores_GRTS, axis=-1).reshape(N, T)
