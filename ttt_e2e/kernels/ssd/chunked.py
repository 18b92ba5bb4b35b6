"""SSD by matrix products (arXiv 2405.21060, section 6).

Within a chunk, the output is that of a masked attention whose weights are C_t B_s^T times the decay from s to t. The
state at the beginning of each chunk is a sum, decayed, of what the chunks before it added. A scan goes over *groups* of
chunks, so that there are few steps, and the matrices of one group at a time. In reverse, the state before each group is
kept, and the rest is computed again.

Shapes: `N` heads, `T` tokens, `H` head width, `S` state width, `G` chunks of a group, `Q` tokens of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

from ttt_e2e.kernels.chunks import LEAST_LOG_DECAY, in_groups, joined, segment_decay

GROUP_TOKENS = 2048  # tokens of a group: enough to keep a device busy, and few enough for its decays to be small arrays


def ssd(x_NTH, log_decay_NT, B_TS, C_TS, state_NHS, *, chunk_size: int):
    """Computes S_t = exp(log_decay_t) S_{t-1} + x_t B_t^T and y_t = S_t C_t.

    Args:
      x_NTH: inputs, in the dtype of the products.
      log_decay_NT: at most 0, in float32 or wider, which is also the dtype of the results.
      B_TS: of all heads, in the dtype of the products.
      C_TS: likewise.
      state_NHS: the state before the first token.
      chunk_size: tokens of a chunk; it changes no result but for rounding.

    Returns:
      (y [N, T, H], the state after the last token). Differentiable in both modes, any number of times.
    """
    T = x_NTH.shape[1]
    size = min(chunk_size, T)
    log_decay_NT = jnp.maximum(log_decay_NT, LEAST_LOG_DECAY)
    groups = in_groups((x_NTH, log_decay_NT, B_TS[None], C_TS[None]), size, GROUP_TOKENS)

    @partial(jax.checkpoint, prevent_cse=False)
    def step(state_NHS, group):
        return _group(state_NHS, *group)

    state_NHS, y = jax.lax.scan(step, state_NHS, groups)
    return joined(y, T), state_NHS


def _group(state_NHS, x_NGQH, log_decay_NGQ, B_1GQS, C_1GQS):
    """Runs the chunks of a group: returns (the state after them, y [N, G, Q, H])."""
    wide, B_GQS, C_GQS = log_decay_NGQ.dtype, B_1GQS[0], C_1GQS[0]
    product = partial(jnp.einsum, preferred_element_type=wide)
    since_start = jnp.cumsum(log_decay_NGQ, axis=-1)  # from the beginning of the chunk up to each token

    scores_GQQ = product("gts,gus->gtu", C_GQS, B_GQS)
    weights = (scores_GQQ * segment_decay(since_start)).astype(x_NGQH.dtype)
    y_NGQH = product("ngtu,nguh->ngth", weights, x_NGQH)

    to_end = jnp.exp(since_start[..., -1:] - since_start)
    # Chunks before heads, as the product has them: XLA would transpose its last dimensions for the other order, and on
    # CPUs it cannot where bfloat16 is multiplied to float32.
    added_GNHS = product("nguh,gus->gnhs", (to_end[..., None] * x_NGQH).astype(x_NGQH.dtype), B_GQS)
    # What the state before the group and the chunks add to the state before each chunk, and to that after the last.
    parts = jnp.concatenate([state_NHS[:, None], added_GNHS.swapaxes(0, 1)], axis=1)
    since_group_start = jnp.pad(jnp.cumsum(since_start[..., -1], axis=-1), ((0, 0), (1, 0)))
    states = jnp.einsum("nij,njhs->nihs", segment_decay(since_group_start), parts)
    before_NGHS = states[:, :-1].astype(x_NGQH.dtype)
    y_NGQH += jnp.exp(since_start)[..., None] * product("gts,nghs->ngth", C_GQS, before_NGHS)
    return states[:, -1], y_NGQH
