"""Self-attention over a sequence, or over a window cache and the mini-batch that follows it.

Shapes: `T` new positions, `K` cached positions, `b` inner mini-batch, `D` model width, `N` query heads, `G` key/value
heads, `H` head width.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.kernels.one_query import Keys, attend_one
from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import matrix
from ttt_e2e.model.parts import copy_to_all
from ttt_e2e.model.passes import Pass
from ttt_e2e.model.rope import rotate
from ttt_e2e.model.sequence_parts import SequenceParts


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


class Unfinished(NamedTuple):
    """What precedes a position in an unfinished mini-batch: *rotated* keys, and values, head by head.

    They stay the same until the mini-batch is full: rotated once, they serve every token that is predicted in it.
    """

    cached_GKH: KeyValues  # rotated at 0 ... K - 1
    recent_GbH: KeyValues  # of the mini-batch so far, rotated at K ... K + b - 1


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

    def __call__(
        self,
        x_TD,
        compute: Pass,
        *,
        window: int,
        cache: KeyValues | None = None,
        num_empty=0,
        parts: SequenceParts | None = None,
    ):
        """Attends to the window of each position, which may reach back into the cache.

        Args:
          x_TD: normed hidden states of T consecutive positions.
          compute: who computes products and attention.
          window: k; 0 = full attention.
          cache: the K positions before x_TD, or None where x_TD begins the sequence. Positions count from the
            beginning of the cache: absolute float32 angles would be wrong by 0.06 rad at position 2M.
          num_empty: leading positions of the cache that hold nothing yet (may be traced).
          parts: where x_TD is one device's part of a sequence: whose.

        Returns:
          Output [T, D] and the new keys and values [T, G, H].
        """
        T = x_TD.shape[-2]
        q_TNH, k_TGH, v_TGH = self._project(x_TD, compute)
        new = KeyValues(compute.value(k_TGH), compute.value(v_TGH))
        K = 0 if cache is None else cache.k.shape[0]
        positions_T = parts.positions(T) if parts else jnp.arange(K, K + T)
        q_TNH, k_TGH = (self._rotated(a, positions_T) for a in (q_TNH, k_TGH))
        backend = self.config.attention_backend
        attention = partial(_by_position, compute.attention, backend=backend)
        if parts:
            return self._output(parts.attend(attention, q_TNH, k_TGH, v_TGH, window=window), compute), new
        # Cached keys and values go in apart: constants to the inner gradient, which then spends nothing on them.
        cached = {} if cache is None else {"cached_k": self._rotated(cache.k, jnp.arange(K)), "cached_v": cache.v}
        options = {"window": window, "num_empty": num_empty}
        return self._output(attention(q_TNH, k_TGH, v_TGH, **options, **cached), compute), new

    def decode(self, x_1D, compute: Pass, *, window: int, before: Unfinished, num_empty, count):
        """As `__call__`, for one position of an unfinished mini-batch, without copying what precedes it.

        Args:
          x_1D: its normed hidden state.
          compute: who computes products.
          window: k; 0 = full attention.
          before: what precedes it.
          num_empty: leading positions of the cache that hold nothing yet (may be traced).
          count: positions of the mini-batch before this one (may be traced).

        Returns:
          Output [1, D], and the position's key, *rotated*, and value [1, G, H].
        """
        q_1NH, k_1GH, v_1GH = self._project(x_1D, compute)
        K, b = before.cached_GKH.k.shape[1], before.recent_GbH.k.shape[1]
        q_1NH, k_1GH = (self._rotated(a, K + count + jnp.arange(1)) for a in (q_1NH, k_1GH))
        reach = window or K + b + 1
        first = max(0, K - reach)  # a longer cache is another block's, of full attention
        cached_GKH = jax.tree.map(lambda a: a[:, first:], before.cached_GKH)
        place_K, place_b = jnp.arange(first, K), jnp.arange(b)
        out_NH = attend_one(
            q_1NH[0],
            Keys(*cached_GKH, (place_K >= num_empty) & (place_K > K + count - reach)),
            Keys(*before.recent_GbH, (place_b < count) & (place_b > count - reach)),
            Keys(k_1GH.swapaxes(0, 1), v_1GH.swapaxes(0, 1), jnp.ones(1, bool)),
        )
        return self._output(out_NH[None], compute), KeyValues(k_1GH, v_1GH)

    def _project(self, x_TD, compute: Pass):
        """Queries [T, N, H], and keys and values [T, G, H]: normed, unrotated."""
        x_TD = copy_to_all(x_TD, self.is_divided)
        q_TNH, k_TGH, v_TGH = (self._heads(compute.product(x_TD, w[...])) for w in (self.wq, self.wk, self.wv))
        if self.config.qk_norm:
            q_TNH, k_TGH = compute.lift(self.q_norm, q_TNH), compute.lift(self.k_norm, k_TGH)
        return q_TNH, k_TGH, v_TGH

    def _output(self, out_TNH, compute: Pass):
        """[T, D]"""
        return compute.product(out_TNH.reshape(*out_TNH.shape[:-2], -1), self.wo[...], divided=self.is_divided)

    @property
    def is_divided(self) -> bool:
        """Whether the matrices are those of one device's heads (parts.py)."""
        return self.wo[...].shape[-2] < self.config.num_attention_heads * self.config.head_dim

    def _rotated(self, x_TNH, positions_T):
        return rotate(x_TNH, positions_T, theta=self.config.rope_theta, style=self.config.rope_style)

    def _heads(self, x_T):
        return x_T.reshape(*x_T.shape[:-1], -1, self.config.head_dim)


def _by_position(attention, *arrays, **options):
    """`window_attention`, whose arrays are heads first, of arrays [..., positions, heads, H]."""
    cached = {name: a.swapaxes(-3, -2) for name, a in options.items() if name.startswith("cached")}
    return attention(*(a.swapaxes(-3, -2) for a in arrays), **options | cached).swapaxes(-3, -2)
