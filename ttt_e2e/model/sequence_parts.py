"""Sequence parallelism: attention over a sequence whose positions are divided among the devices of the mesh axis
`model`.

Each device has T consecutive positions, and whole matrices. It gets keys and values of other positions in one of two
ways:

    neighbours  by `ppermute`: the keys and values of the positions before its own, as many as the window reaches back
    heads       by `all_to_all` (as in DeepSpeed-Ulysses): devices exchange positions for heads, so that each has the
                whole sequence of N / num_parts heads. All devices then do the same amount of work. The outputs go back
                the same way.

Shapes: `T` positions of a part, `N` query heads, `G` key/value heads, `H` head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.model.parts import AXIS

# A window is fetched from neighbours if it is at most this share of T. The fused first-order kernels take as many
# queries as keys, so that queries at the fetched positions are computed for nothing: 1/8 of the window's scores at this
# share, half of them for a window of T.
MAX_WINDOW_SHARE = 0.25


class SequenceParts(NamedTuple):
    """A sequence divided evenly among the devices of the axis `model`, in order."""

    num_parts: int

    def positions(self, T: int):
        """Returns the positions [T] of this device's part in the sequence."""
        return jax.lax.axis_index(AXIS) * T + jnp.arange(T)

    def attend(self, attention, q_NTH, k_GTH, v_GTH, *, window: int):
        """Computes attention's output [N, T, H] for this device's positions.

        Args:
          attention: function with the arguments of `window_attention`.
          q_NTH: rotated queries.
          k_GTH: rotated keys.
          v_GTH: values.
          window: number of positions attended to; 0 = full attention.
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
        """Fetches the `reach` positions before this device's own; zeros before the beginning of the sequence."""
        T = a_GTH.shape[1]
        parts = []
        for hop in range(-(-reach // T), 0, -1):
            count = min(T, reach - (hop - 1) * T)
            pairs = [(source, source + hop) for source in range(self.num_parts - hop)]
            parts.append(jax.lax.ppermute(a_GTH[:, T - count :], AXIS, pairs))
        return jnp.concatenate(parts, axis=1)


def by_heads(window: int, T: int, G: int, num_parts: int) -> bool:
    """Decides whether devices exchange heads, not window neighbours; key/value heads must divide evenly."""
    return G % num_parts == 0 and not 0 < window <= MAX_WINDOW_SHARE * T


def received_positions(window: int, T: int, N: int, G: int, num_parts: int) -> float:
    """Counts the vectors [H], each one head at one position, that a device receives in one forward pass."""
    if by_heads(window, T, G, num_parts):
        return T * (2 * N + 2 * G) * (num_parts - 1) / num_parts
    return 2 * G * _reach(window, T, num_parts)


def _reach(window: int, T: int, num_parts: int) -> int:
    """Counts the positions before its own that a device fetches from neighbours."""
    everything = (num_parts - 1) * T
    return min(window, everything) if window else everything
