"""The algebra of every pass, over one block of queries and all the keys that it can see, in plain jax.numpy.

Source: docs/kernels.md, which calls lse_dot `mu`; the other words are explained in the package's docstring. All of a
row's keys are here, so its statistics are plain sums over the last axis, and the mean of the tangent of its scores is
subtracted *before* the sum over keys: in bfloat16 that would otherwise cancel where |mu| is large.

Shapes: rows [..., R, t, H], t queries of each of the R query heads that share a key head; row statistics
[..., R, t, 1]; keys [..., W, H]; scores [..., R, t, W]. Tangents of keys may cover the last w of the W keys only, the
others being constant; gradients likewise cover the last `num_keys`. Matrix products take operands of the inputs' dtype
and accumulate in float32 or wider, as all scores and statistics are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.kernels.attention import score_tiles
from ttt_e2e.kernels.attention.score_tiles import mean, wide


class View(NamedTuple):
    """Which keys the queries of a block see."""

    visible: jax.Array  # [..., t, W], or what broadcasts to it: whether a query sees a key
    own_t: jax.Array  # [t], the last key that each query sees, as an index into the W


def forward(q, k, v, view):
    """Output and lse; takes 2 matrix products."""
    weights, total, lse = _softmax(q, k, view)
    return _sum_keys(weights, v, view) / total, lse


def tangent(q, k, v, lse, q_dot, k_dot, v_dot, view):
    """o_dot and lse_dot; takes 5 matrix products."""
    return _tangent(_probabilities(q, k, lse, view), q, k, v, q_dot, k_dot, v_dot, view)


def dual(q, k, v, q_dot, k_dot, v_dot, view):
    """Output, lse and the tangents of both, in one pass; takes 6 matrix products."""
    weights, total, lse = _softmax(q, k, view)
    o = _sum_keys(weights, v, view) / total
    return o, lse, *_tangent(weights / total, q, k, v, q_dot, k_dot, v_dot, view)


def reverse(q, k, v, lse, o_bar, lse_bar, view, num_keys):
    """Gradients of q, k, v; takes 5 matrix products."""
    p = _probabilities(q, k, lse, view)
    p_bar = _products(o_bar, v)
    scores_bar = score_tiles.scores_bar(p, p_bar, mean(p, p_bar), lse_bar)
    scale = q.shape[-1] ** -0.5
    k_bar = _sum_rows(scores_bar[..., -num_keys:], q) * scale
    return _sum_keys(scores_bar, k, view) * scale, k_bar, _sum_rows(p[..., -num_keys:], o_bar)


def second_reverse(q, k, v, lse, q_dot, k_dot, v_dot, lse_dot, bars, view, num_keys):
    """Reverse of the forward pass and its tangent at once; takes 15 matrix products, without o_bar and lse_bar 13.

    Args:
      bars: cotangents of (o_dot, lse_dot) or of (o_dot, lse_dot, o, lse).

    Returns:
      Gradients of q, k, v and of q_dot, k_dot, v_dot, these for as many keys as have tangents.
    """
    o_dot_bar, lse_dot_bar, *o_bars = bars
    p = _probabilities(q, k, lse, view)
    centred = _add_last(_scores(q_dot, k), _scores(q, k_dot)) - lse_dot
    p_dot_bar = _products(o_dot_bar, v)
    centred_bar = score_tiles.deviation(p_dot_bar, mean(p, p_dot_bar), lse_dot_bar)
    p_bar = _add_last(centred * centred_bar, _products(o_dot_bar, v_dot))
    v_bar = _sum_rows((p * centred)[..., -num_keys:], o_dot_bar)
    lse_bar = 0
    if o_bars:
        o_bar, lse_bar = o_bars
        p_bar += _products(o_bar, v)
        v_bar += _sum_rows(p[..., -num_keys:], o_bar)
    scores_dot_bar, scores_bar = p * centred_bar, score_tiles.scores_bar(p, p_bar, mean(p, p_bar), lse_bar)
    scale = q.shape[-1] ** -0.5
    q_bar = _sum_keys(scores_bar, k, view) + _sum_keys(_last(scores_dot_bar, k_dot), k_dot, view)
    k_bar = _sum_rows(scores_bar[..., -num_keys:], q) + _sum_rows(scores_dot_bar[..., -num_keys:], q_dot)
    dots = _sum_keys(scores_dot_bar, k, view) * scale, _sum_rows(_last(scores_dot_bar, k_dot), q) * scale
    return q_bar * scale, k_bar * scale, v_bar, *dots, _sum_rows(_last(p, v_dot), o_dot_bar)


def _softmax(q, k, view):
    """Unnormalised weights [..., R, t, W], their totals and lse [..., R, t, 1]."""
    weights, largest, total = score_tiles.soften(score_tiles.mask(_scores(q, k), view.visible))
    return weights, total, score_tiles.lse(largest, total)


def _tangent(p, q, k, v, q_dot, k_dot, v_dot, view):
    scores_dot = _add_last(_scores(q_dot, k), _scores(q, k_dot))
    lse_dot = mean(p, scores_dot)
    o_dot = _sum_keys(p * (scores_dot - lse_dot), v, view) + _sum_keys(_last(p, v_dot), v_dot, view)
    return o_dot, lse_dot


def _probabilities(q, k, lse, view):
    return score_tiles.probabilities(score_tiles.mask(_scores(q, k), view.visible), lse)


def _products(rows, keys):
    return jnp.einsum("...rth,...wh->...rtw", rows, keys, preferred_element_type=wide(keys.dtype))


def _scores(q, k):
    return _products(q, k) * q.shape[-1] ** -0.5


def _sum_keys(weights, keys, view):
    """Weighted sums of the last keys, [..., R, t, H].

    What rounding takes from a row's total is given back at the row's own key: at a later key, a query's result would
    depend on a key that it must not see.
    """
    narrow, lost = score_tiles.narrow(weights, keys.dtype)
    sums = jnp.einsum("...rtw,...wh->...rth", narrow, keys, preferred_element_type=weights.dtype)
    if lost is None:
        return sums
    own_t = view.own_t - (view.visible.shape[-1] - keys.shape[-2])
    return sums + lost * jnp.take(keys, own_t, axis=-2)[..., None, :, :].astype(weights.dtype)


def _sum_rows(weights, rows):
    weights = weights.astype(rows.dtype)
    return jnp.einsum("...rtw,...rth->...wh", weights, rows, preferred_element_type=wide(rows.dtype))


def _last(scores, keys):
    """The scores with the last keys, as many as `keys` has."""
    return scores[..., -keys.shape[-2] :]


def _add_last(scores, more):
    """Scores plus those with the last keys, `more`."""
    missing = scores.shape[-1] - more.shape[-1]
    return scores + jnp.pad(more, [(0, 0)] * (more.ndim - 1) + [(missing, 0)])
