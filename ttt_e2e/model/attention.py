"""Self-attention over a sequence, or over a window cache and the mini-batch that follows it.

Shapes: `T` new positions, `K` cached positions, `D` model width, `N` query heads, `G` key/value heads, `H` head width.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import matrix
from ttt_e2e.model.passes import Pass
from ttt_e2e.model.rope import rotate


class KeyValues(NamedTuple):
    """Normed, unrotated keys and values [..., positions, G, H]: a window cache, or a mini-batch's additions to it."""

    k: jax.Array
    v: jax.Array

    def append(self, new: "KeyValues") -> "KeyValues":
        """The cache after reading `new`: as many of the most recent positions as it held before."""
        size = self.k.shape[-3]

        def most_recent(old, added):
            both = jnp.concatenate([old, added], axis=-3)
            return jax.lax.slice_in_dim(both, both.shape[-3] - size, both.shape[-3], axis=both.ndim - 3)

        return KeyValues(most_recent(self.k, new.k), most_recent(self.v, new.v))


class Attention(nnx.Module):
    """Grouped-query attention with optional QK-norm, applied before RoPE."""

    def __init__(self, config, rngs: nnx.Rngs):
        D, H = config.hidden_size, config.head_dim
        N, G = config.num_attention_heads, config.num_key_value_heads
        self.wq = matrix(rngs, (D, N * H), config)
        self.wk = matrix(rngs, (D, G * H), config)
        self.wv = matrix(rngs, (D, G * H), config)
        self.wo = matrix(rngs, (N * H, D), config)
        if config.qk_norm:
            self.q_norm = RMSNorm(H, config)
            self.k_norm = RMSNorm(H, config)
        self.config = config

    def __call__(self, x_TD, compute: Pass, *, window: int, cache: KeyValues | None = None, num_empty=0):
        """Attends to the window of each position, which may reach back into the cache.

        Args:
          x_TD: normed hidden states of T consecutive positions.
          compute: who computes products and attention.
          window: k; 0 = full attention.
          cache: the K positions before x_TD, or None where x_TD begins the sequence. Positions count from the
            beginning of the cache: absolute float32 angles would be wrong by 0.06 rad at position 2M.
          num_empty: leading positions of the cache that hold nothing yet (may be traced).

        Returns:
          Output [T, D] and the new keys and values [T, G, H].
        """
        config, T = self.config, x_TD.shape[0]
        q_TNH = self._heads(compute.product(x_TD, self.wq[...]))
        k_TGH = self._heads(compute.product(x_TD, self.wk[...]))
        v_TGH = self._heads(compute.product(x_TD, self.wv[...]))
        if config.qk_norm:
            q_TNH, k_TGH = self.q_norm(q_TNH), self.k_norm(k_TGH)
        new = KeyValues(k_TGH, v_TGH)
        K = 0 if cache is None else cache.k.shape[0]
        rotated = partial(rotate, theta=config.rope_theta, style=config.rope_style)
        q_TNH, k_TGH = (rotated(a, jnp.arange(K, K + T)) for a in (q_TNH, k_TGH))
        # Cached keys and values go in apart: constants to the inner gradient, which then spends nothing on them.
        cached = {} if cache is None else {"cached_k": rotated(cache.k, jnp.arange(K)), "cached_v": cache.v}
        out_TNH = compute.attention(q_TNH, k_TGH, v_TGH, window=window, num_empty=num_empty, **cached)
        return compute.product(out_TNH.reshape(T, -1), self.wo[...]), new

    def _heads(self, x_T):
        return x_T.reshape(x_T.shape[0], -1, self.config.head_dim)
