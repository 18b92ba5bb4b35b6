"""Adds a few keys to the softmax of an attention that is already computed.

Shapes: `T` queries, `S` added keys, `N` query heads, `G` key/value heads, `R` = N / G, `H` head width.
"""

import jax
import jax.numpy as jnp

from ttt_e2e.kernels.attention.reference import MASKED_SCORE


def add_keys(out_NTH, lse_NT, q_NTH, k_GSH, v_GSH, visible_TS):
    """Attention [N, T, H] to the keys of an earlier result and to S more, of which query t sees key s where visible.

    Args:
      out_NTH: the earlier result.
      lse_NT: its lse.
      q_NTH: queries, as the added keys are to be met: rotated otherwise than for the earlier result, if need be.
      k_GSH: the added keys.
      v_GSH: their values.
      visible_TS: booleans.
    """
    N, T, H = q_NTH.shape
    q_GRTH = q_NTH.reshape(len(k_GSH), -1, T, H)
    scores_GRTS = jnp.einsum("grth,gsh->grts", q_GRTH, k_GSH, preferred_element_type=lse_NT.dtype) * H**-0.5
    scores_NTS = jnp.where(visible_TS, scores_GRTS.reshape(N, T, -1), MASKED_SCORE)
    weights = jax.nn.softmax(jnp.concatenate([lse_NT[..., None], scores_NTS], axis=-1), axis=-1).astype(v_GSH.dtype)
    weights_GRTS = weights[..., 1:].reshape(scores_GRTS.shape)
    added_NTH = jnp.einsum("grts,gsh->grth", weights_GRTS, v_GSH).reshape(N, T, -1)
    return weights[..., :1] * out_NTH + added_NTH
