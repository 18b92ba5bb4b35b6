"""Attention over a sequence whose positions are divided among the devices of the mesh axis `model`.

Each device has T consecutive positions, and all matrices. What it needs of the other devices for attention, it gets in
one of two ways:

    neighbours  the keys and values before its own positions, as many as a window reaches back
    heads       every device gives each of the others its positions of some heads, and gets theirs of its own heads:
                whole sequences of N / num_parts heads. Attention is then as of an undivided sequence, and as much work
                for each device; the outputs go back the same way.

Shapes: `T` positions of a part, `N` query heads, `G` key/value heads, `H` head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.model.parts import AXIS

# A window is fetched from neighbours where it is at most this share of a part. The fused first-order kernels take as
# many queries as keys, so that queries at the fetched positions are computed for nothing: 1/8 of the window's scores at
# this share, half of them where a window is as long as a part.
MAX_WINDOW_SHARE = 0.25


class SequenceParts(NamedTuple):
    """A sequence divided evenly among the devices of the axis `model`, in order."""

    num_parts: int

    def positions(self, T: int):
        """Positions [T] of this device's part."""
        return jax.lax.axis_index(AXIS) * T + jnp.arange(T)

    def attend(self, attention, q_NTH, k_GTH, v_GTH, *, window: int):
        """Output [N, T, H] of this device's positions.

        Args:
          attention: what computes it from queries, keys and values, as `window_attention` does.
          q_NTH: rotated queries.
          k_GTH: rotated keys.
          v_GTH: values.
          window: k; 0 = full attention.
        """
        G, T, _ = k_GTH.shape
        if by_heads(window, T, G, self.num_parts):
            by_head = (jax.lax.all_to_all(a, AXIS, 0, 1, tiled=True) for a in (q_NTH, k_GTH, v_GTH))
            return jax.lax.all_to_all(attention(*by_head, window=window, num_empty=0), AXIS, 1, 0, tiled=True)
        reach = _reach(window, T, self.num_parts)
        cached = {name: self._preceding(a, reach) for name, a in (("cached_k", k_GTH), ("cached_v", v_GTH))}
        num_empty = jnp.maximum(reach - jax.lax.axis_index(AXIS) * T, 0)
        return attention(q_NTH, k_GTH, v_GTH, window=window, num_empty=num_empty, **cached)

    def _preceding(self, a_GTH, reach: int):
        """The `reach` positions before this device's own, of its neighbours; zeros before the sequence begins."""
        T = a_GTH.shape[1]
        parts = []
        for hop in range(-(-reach // T), 0, -1):
            count = min(T, reach - (hop - 1) * T)
            pairs = [(source, source + hop) for source in range(self.num_parts - hop)]
            parts.append(jax.lax.ppermute(a_GTH[:, T - count :], AXIS, pairs))
        return jnp.concatenate(parts, axis=1)


def by_heads(window: int, T: int, G: int, num_parts: int) -> bool:
    """Whether devices exchange heads, and not window neighbours; heads must divide evenly."""
    return G % num_parts == 0 and not 0 < window <= MAX_WINDOW_SHARE * T


def received_positions(window: int, T: int, N: int, G: int, num_parts: int) -> float:
    """Number of vectors [H], each one head at one position, that a device receives in one forward pass."""
    if by_heads(window, T, G, num_parts):
        return T * (2 * N + 2 * G) * (num_parts - 1) / num_parts
    return 2 * G * _reach(window, T, num_parts)


def _reach(window: int, T: int, num_parts: int) -> int:
    """Number of positions before its own that a device fetches."""
    everything = (num_parts - 1) * T
    return min(window, everything) if window else everything
