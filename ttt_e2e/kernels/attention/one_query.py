"""Attention of a single query to keys in several arrays, which decoding reads for every token.

`window_attention` would join the arrays, and so copy every key for each token.

Shapes: `S` keys, `N` query heads, `G` key/value heads, `R` = N / G, `H` head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.kernels.attention import tiles


class Keys(NamedTuple):
    """Some of the keys, with their values: [G, S, H], the layout in which caches hold them."""

    k_GSH: jax.Array
    v_GSH: jax.Array
    visible_S: jax.Array  # whether the query sees each


def attend_one(q_NH, *parts: Keys):
    """Attention of one query [N, H] to the visible keys of all parts: [N, H], in the dtype of the values; and lse [N].

    Each part has at least one key, and at least one part a visible one.
    """
    q_GRH = q_NH.reshape(parts[0].k_GSH.shape[0], -1, q_NH.shape[-1])
    # The R query heads of a key head as R rows of one. Where a part has no visible key, its lse is about -1e30.
    results = [
        tiles.forward(q_GRH[:, None], k_GSH, v_GSH, _view(visible_S, q_GRH.shape[1]))
        for k_GSH, v_GSH, visible_S in parts
    ]
    outs, lses = (jnp.stack(arrays) for arrays in zip(*results))
    out_G1RH = jnp.sum(jax.nn.softmax(lses, axis=0) * outs, axis=0)
    out_NH = out_G1RH.reshape(q_NH.shape[0], -1).astype(parts[0].v_GSH.dtype)
    return out_NH, jax.nn.logsumexp(lses, axis=0).reshape(-1)


def _view(visible_S, num_rows: int) -> tiles.View:
    last = jnp.max(jnp.where(visible_S, jnp.arange(visible_S.shape[0]), 0))
    return tiles.View(visible_S, jnp.full(num_rows, last))
