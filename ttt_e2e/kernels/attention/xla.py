"""The passes over a whole sequence in plain XLA: the algebra of tiles.py, applied to one block of queries at a time.

Runs everywhere. It skips the scores outside the band and holds those of one block at a time, so that its memory is
linear in T at a fixed window. Every hardware kernel is tested against it.

Shapes: `T` queries, `S` keys, `R` query heads per key head, `H` head width; any leading axes, of which the last counts
key heads. Rows [..., R, T, H], row statistics [..., R, T], keys [..., S, H]; tangents of keys cover the last L of the S
keys. `num_empty` has the leading axes but the last (each of its own size or 1).
"""

from functools import partial

import jax
import jax.numpy as jnp

from ttt_e2e.kernels.attention import bands, tiles


def forward(q, k, v, num_empty, *, window):
    """Output [..., R, T, H] and lse [..., R, T]."""

    def tile(rows, keys, view):
        return tiles.forward(*rows, *keys, view), ()

    (o, lse), _ = _sweep(tile, (q,), (k, v), num_empty, window, outputs=(v.shape[-1], 1))
    return o.astype(v.dtype), lse[..., 0]


def tangent(q, k, v, num_empty, o, lse, q_dot, k_dot, v_dot, *, window):
    """Tangents of the output and of lse."""

    def tile(rows, keys, view):
        (q, lse, q_dot), (k, v, k_dot, v_dot) = rows, keys
        return tiles.tangent(q, k, v, lse, q_dot, k_dot, v_dot, view), ()

    rows, keys = (q, lse[..., None], q_dot), (k, v, k_dot, v_dot)
    (o_dot, lse_dot), _ = _sweep(tile, rows, keys, num_empty, window, outputs=(o.shape[-1], 1))
    return o_dot.astype(o.dtype), lse_dot[..., 0]


def dual(q, k, v, num_empty, q_dot, k_dot, v_dot, *, window):
    """`forward` and `tangent` in one: output, lse and the tangents of both."""

    def tile(rows, keys, view):
        (q, q_dot), (k, v, k_dot, v_dot) = rows, keys
        return tiles.dual(q, k, v, q_dot, k_dot, v_dot, view), ()

    H = v.shape[-1]
    (o, lse, o_dot, lse_dot), _ = _sweep(
        tile, (q, q_dot), (k, v, k_dot, v_dot), num_empty, window, outputs=(H, 1, H, 1)
    )
    return o.astype(v.dtype), lse[..., 0], o_dot.astype(v.dtype), lse_dot[..., 0]


def reverse(q, k, v, num_empty, o, lse, o_bar, lse_bar, *, window, num_keys):
    """Gradients of q and of the last `num_keys` of k and v."""

    def tile(rows, keys, view):
        (q, *rows), (k, v) = rows, keys
        q_bar, k_bar, v_bar = tiles.reverse(q, k, v, *rows, view, min(num_keys, k.shape[-2]))
        return (q_bar,), (k_bar, v_bar)

    rows = (q, lse[..., None], o_bar, lse_bar[..., None])
    sums = ((num_keys, k.shape[-1]), (num_keys, v.shape[-1]))
    (q_bar,), (k_bar, v_bar) = _sweep(tile, rows, (k, v), num_empty, window, outputs=(q.shape[-1],), sums=sums)
    return q_bar.astype(q.dtype), k_bar.astype(k.dtype), v_bar.astype(v.dtype)


def second_reverse(q, k, v, num_empty, o, lse, q_dot, k_dot, v_dot, o_dot, lse_dot, *bars, window, num_keys):
    """Gradients of q, the last `num_keys` of k and v, and of q_dot, k_dot, v_dot, given those of the tangent.

    `bars` are the cotangents of (o_dot, lse_dot) and, where these have any, of (o, lse).
    """

    def tile(rows, keys, view):
        (q, lse, q_dot, lse_dot, *bars), (k, v, k_dot, v_dot) = rows, keys
        q_bar, k_bar, v_bar, q_dot_bar, k_dot_bar, v_dot_bar = tiles.second_reverse(
            q, k, v, lse, q_dot, k_dot, v_dot, lse_dot, bars, view, min(num_keys, k.shape[-2])
        )
        return (q_bar, q_dot_bar), (k_bar, v_bar, k_dot_bar, v_dot_bar)

    bars = [bar if i % 2 == 0 else bar[..., None] for i, bar in enumerate(bars)]
    rows = (q, lse[..., None], q_dot, lse_dot[..., None], *bars)
    H = q.shape[-1]
    sums = ((num_keys, k.shape[-1]), (num_keys, v.shape[-1]), k_dot.shape[-2:], v_dot.shape[-2:])
    (q_bar, q_dot_bar), keys_bar = _sweep(
        tile, rows, (k, v, k_dot, v_dot), num_empty, window, outputs=(H, H), sums=sums
    )
    k_bar, v_bar, k_dot_bar, v_dot_bar = (bar.astype(k.dtype) for bar in keys_bar)
    return q_bar.astype(q.dtype), k_bar, v_bar, q_dot_bar.astype(q.dtype), k_dot_bar, v_dot_bar


def _sweep(tile, rows, keys, num_empty, window, *, outputs=(), sums=()):
    """Calls `tile` for every block of queries, with the keys that the block can see.

    Args:
      tile: (rows, keys, `View`) -> (outputs of these rows, terms to add to these keys' sums).
      rows: arrays [..., R, T, any].
      keys: arrays [..., L, any] of the last L of the S keys; the first array has them all.
      num_empty: leading keys that no query sees.
      window: k; 0 = all.
      outputs: widths of the outputs [..., R, T, width].
      sums: sizes (L, width) of the sums [..., L, width].

    Returns:
      Outputs and sums, in the dtype of scores.
    """
    *leading, T, _ = rows[0].shape
    dtype = tiles.wide(keys[0].dtype)
    band = bands.plan(T, keys[0].shape[-2], window)
    padded_T = band.num_blocks * band.block
    lengths, sum_lengths = [a.shape[-2] for a in keys], [length for length, _ in sums]
    # Hides from XLA which operands are constant. XLA for CPU (JAX 0.10.2 and 0.12.0) moves an array of constant zeros
    # into the loop, where its fused product reads memory that nothing has written.
    rows, keys = jax.lax.optimization_barrier((rows, keys))
    rows = [_pad(a, 0, padded_T - T) for a in rows]
    keys = [_pad(a, band.padding(a.shape[-2]), 0) for a in keys]
    outputs = [jnp.zeros((*leading, padded_T, width), dtype) for width in outputs]
    sums = [jnp.zeros((*leading[:-1], band.padding(length) + length, width), dtype) for length, width in sums]

    def visit(num_keys, block, carry):
        """Computes one block of queries. Its slices of all arrays of keys end at the same position."""
        outputs, sums = carry
        stop = band.stop(block, num_keys)

        def start(a, length):
            return stop - band.num_keys + a.shape[-2] - min(num_keys, length)

        row_parts = [_slice(a, block * band.block, band.block) for a in rows]
        key_parts = [_slice(a, start(a, length), min(num_keys, length)) for a, length in zip(keys, lengths)]
        new, more = tile(row_parts, key_parts, _view(band, block, stop, num_keys, num_empty))
        outputs = [_update(a, part.astype(dtype), block * band.block) for a, part in zip(outputs, new)]
        starts = [start(a, length) for a, length in zip(sums, sum_lengths)]
        sums = [_update(a, _slice(a, i, part.shape[-2]) + part, i) for a, i, part in zip(sums, starts, more)]
        return outputs, sums

    carry = outputs, sums
    for first, last, num_keys in band.segments:
        carry = jax.lax.fori_loop(first, last, partial(visit, num_keys), carry)
    outputs, sums = carry
    return [a[..., :T, :] for a in outputs], [a[..., -length:, :] for a, length in zip(sums, sum_lengths)]


def _view(band, block, stop, num_keys, num_empty) -> tiles.View:
    """Which of the `num_keys` keys before position `stop` the queries of a block see."""
    query_t = band.end(block - 1) + jnp.arange(band.block)
    key = stop - num_keys + jnp.arange(num_keys)
    query = query_t[:, None]
    visible = (key <= query) & (key > query - band.window) & (key >= num_empty[..., None, None, None, None])
    own_t = jnp.minimum(query_t, stop - 1) - (stop - num_keys)  # of padded queries, any
    return tiles.View(visible, own_t)


def _pad(a, before, after):
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(before, after), (0, 0)]) if before or after else a


def _slice(a, start, size):
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis=a.ndim - 2)


def _update(a, part, start):
    return jax.lax.dynamic_update_slice_in_dim(a, part, start, axis=a.ndim - 2)
