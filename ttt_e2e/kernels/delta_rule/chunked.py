"""The gated delta rule by matrix products (arXiv 2412.06464, section 3.3).

Within a chunk, with d_t the decay from its beginning, d_ts that from s to t, and S the state before it:

    u_t + sum over s < t of beta_t d_ts (k_t k_s) u_s = beta_t v_t - beta_t d_t S^T k_t

is a triangular system of equations. Its matrix is inverted, for both terms on the right, of which the second is linear
in S. This and all products of tokens with tokens are computed for a *group* of chunks at a time. Then a scan over these
chunks has only products with the state left to do:

    u = (solution for v) - (solution for k) S       o_t = d_t S^T q_t + sum over s <= t of d_ts (q_t k_s) u_s

In reverse, the state before each group is kept, and the rest is computed again.

Shapes: `N` heads, `T` tokens, `K` width of keys, `V` width of values, `G` chunks of a group, `Q` tokens of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

from ttt_e2e.kernels.chunks import LEAST_LOG_DECAY, in_groups, joined, segment_decay

GROUP_TOKENS = 2048  # tokens of a group: enough to keep a device busy, and few enough for small residuals


def delta_rule(q_NTK, k_NTK, v_NTV, beta_NT, log_decay_NT, state_NKV, *, chunk_size: int):
    """Runs the gated delta rule.

    Args:
      q_NTK: queries, in the dtype of the products.
      k_NTK: keys of norm 1 or less, likewise.
      v_NTV: values, likewise.
      beta_NT: from 0 to 1, in float32 or wider.
      log_decay_NT: at most 0, in float32 or wider, which is also the dtype of the results.
      state_NKV: the state before the first token.
      chunk_size: tokens of a chunk; it changes no result but for rounding.

    Returns:
      (o [N, T, V], the state after the last token). Differentiable in both modes, any number of times.
    """
    T = q_NTK.shape[1]
    log_decay_NT = jnp.maximum(log_decay_NT, LEAST_LOG_DECAY)
    groups = in_groups((q_NTK, k_NTK, v_NTV, beta_NT, log_decay_NT), min(chunk_size, T), GROUP_TOKENS)

    @partial(jax.checkpoint, prevent_cse=False)
    def step(state_NKV, group):
        return _group(state_NKV, *group)

    state_NKV, o = jax.lax.scan(step, state_NKV, groups)
    return joined(o, T), state_NKV


def _group(state_NKV, q_NGQK, k_NGQK, v_NGQV, beta_NGQ, log_decay_NGQ):
    """Runs the chunks of a group: returns (the state after them, o [N, G, Q, V])."""
    wide, dtype, Q = log_decay_NGQ.dtype, q_NGQK.dtype, q_NGQK.shape[2]
    product = partial(jnp.einsum, preferred_element_type=wide)
    since_start = jnp.cumsum(log_decay_NGQ, axis=-1)  # from the beginning of the chunk up to each token
    decays, from_start = segment_decay(since_start), jnp.exp(since_start)[..., None]
    to_end = jnp.exp(since_start[..., -1:] - since_start)[..., None]

    overlaps = beta_NGQ[..., None] * decays * product("ngtk,ngsk->ngts", k_NGQK, k_NGQK)
    inverse = inverse_of_unit_lower(jnp.where(jnp.tril(jnp.ones((Q, Q), bool), -1), overlaps, 0)).astype(dtype)
    of_values = product("ngts,ngsv->ngtv", inverse, (beta_NGQ[..., None] * v_NGQV).astype(dtype))
    of_keys = product("ngts,ngsk->ngtk", inverse, (beta_NGQ[..., None] * from_start * k_NGQK).astype(dtype))

    scores = (decays * product("ngtk,ngsk->ngts", q_NGQK, k_NGQK)).astype(dtype)
    queries, keys = (from_start * q_NGQK).astype(dtype), (to_end * k_NGQK).astype(dtype)

    def step(state_NKV, chunk):
        of_values, of_keys, scores, queries, keys, decay_N = chunk
        before = state_NKV.astype(dtype)
        u_NQV = (of_values - product("nqk,nkv->nqv", of_keys.astype(dtype), before)).astype(dtype)
        o_NQV = product("nqk,nkv->nqv", queries, before) + product("nts,nsv->ntv", scores, u_NQV)
        return decay_N[:, None, None] * state_NKV + product("nqk,nqv->nkv", keys, u_NQV), o_NQV

    chunks = (of_values, of_keys, scores, queries, keys, from_start[..., -1, 0])
    state_NKV, o_GNQV = jax.lax.scan(step, state_NKV, jax.tree.map(lambda a: a.swapaxes(0, 1), chunks))
    return state_NKV, o_GNQV.swapaxes(0, 1)


def inverse_of_unit_lower(lower):
    """Inverts I + `lower` [..., Q, Q], whose entries on and above the diagonal are not read.

    By products of blocks of 1, 2, 4, ... rows: the inverse of [[A, 0], [C, B]] is [[A', 0], [-B' C A', B']]. A solver
    of triangular systems would be a call of a library on most platforms, for matrices too small to be worth one; on
    CPUs with few cores such calls inside of a scan have been seen to wait for each other without end.
    """
    *lead, Q, _ = lower.shape
    padded = 1 << (Q - 1).bit_length()
    lower = jnp.pad(lower, [(0, 0)] * len(lead) + [(0, padded - Q)] * 2)
    inverses = jnp.ones((*lead, padded, 1, 1), lower.dtype)  # of the blocks on the diagonal
    size = 1
    while size < padded:
        pairs = padded // (2 * size)
        below = lower.reshape(*lead, pairs, 2, size, pairs, 2, size)[..., 1, :, :, 0, :]
        C = jnp.moveaxis(jnp.diagonal(below, axis1=-4, axis2=-2), -1, -3)
        A, B = jnp.moveaxis(inverses.reshape(*lead, pairs, 2, size, size), -3, 0)
        rows = jnp.concatenate([A, jnp.zeros_like(A)], -1), jnp.concatenate([-B @ C @ A, B], -1)
        inverses, size = jnp.concatenate(rows, -2), 2 * size
    return inverses[..., 0, :Q, :Q]
