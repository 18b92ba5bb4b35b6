"""Chunks of a sequence, for recurrences that are computed by matrix products.

Shapes: `N` heads, `T` tokens, `C` chunks of a sequence, `P` groups of chunks, `G` chunks of a group, `Q` tokens of a
chunk.
"""

import jax
import jax.numpy as jnp

# Logarithms of decays are not taken to be less. A decay of 2e-22 forgets everything; the sums of a chunk stay so small
# that their differences are precise.
LEAST_LOG_DECAY = -50.0


def segment_decay(since_start_Q):
    """Computes the decay from each token s to each token t that is not before it, [..., Q, Q] (t, s); 0 where s > t.

    since_start_Q: cumulative sums [..., Q] of the logarithms of the tokens' decays.
    """
    Q = since_start_Q.shape[-1]
    sums = since_start_Q[..., :, None] - since_start_Q[..., None, :]
    # Masked before `exp`, which could overflow there.
    return jnp.exp(jnp.where(jnp.tril(jnp.ones((Q, Q), bool)), sums, -jnp.inf))


def in_groups(arrays, size: int, group_tokens: int):
    """Cuts arrays [N, T, ...] into groups of chunks, [P, N, G, Q, ...], Q = `size`, with zeros after the last token.

    group_tokens: number of tokens of a group, about.
    """
    T = jax.tree.leaves(arrays)[0].shape[1]
    C = -(-T // size)
    num_groups = -(-C // max(1, group_tokens // size))
    G = -(-C // num_groups)

    def cut(a):
        a = jnp.pad(a, [(0, 0), (0, num_groups * G * size - T)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(len(a), num_groups, G, size, *a.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, arrays)


def joined(groups, T: int):
    """Joins groups [P, N, G, Q, ...] to [N, T, ...], without what was padded."""
    P, N, G, Q, *rest = groups.shape
    return groups.swapaxes(0, 1).reshape(N, P * G * Q, *rest)[:, :T]
