"""What is computed on a tile of scores between its matrix products: softmax, means, and the reverse of these.

Shared by tiles.py, where a tile holds all keys of its rows, and by the hardware kernels, which visit a row's keys tile
by tile and are given the means of rows (docs/kernels.md). The two differ in their matrix products and in the order of
their sums.

Shapes: scores [..., t, w] of t queries and w keys; row statistics [..., t, 1], or whatever else broadcasts. All in
float32 or wider, and nothing but jax.numpy on them, so that kernels may call it.
"""

import jax
import jax.numpy as jnp

from ttt_e2e.kernels.attention.reference import MASKED_SCORE


def wide(dtype):
    """The dtype of scores and statistics: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def mask(scores, visible):
    """The scores, with `MASKED_SCORE` where a key is not visible."""
    return jnp.where(visible, scores, MASKED_SCORE)


def soften(scores):
    """The softmax of whole rows: unnormalised weights, the largest score of each row, and the total of its weights."""
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    return weights, largest, jnp.sum(weights, axis=-1, keepdims=True)


def soften_more(scores, largest, total):
    """The softmax of rows that are visited tile by tile: adds one tile.

    Args:
      scores: of the tile, masked.
      largest: largest score of each row so far; before the first tile `MASKED_SCORE`.
      total: total of its weights so far; before the first tile 0.

    Returns:
      Unnormalised weights, the new largest and total, and the factor by which to multiply sums over earlier tiles.
      (Sums over masked keys alone are finite, and the factor of a row's first visible key makes them 0.)
    """
    new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
    weights, decay = jnp.exp(scores - new_largest), jnp.exp(largest - new_largest)
    return weights, new_largest, total * decay + jnp.sum(weights, axis=-1, keepdims=True), decay


def lse(largest, total):
    """The log of the softmax's denominator."""
    return largest + jnp.log(total)


def probabilities(scores, lse):
    """The softmax of masked scores."""
    return jnp.exp(scores - lse)


def mean(p, scores):
    """The mean of each row of scores, weighted by its row of p."""
    return jnp.sum(p * scores, axis=-1, keepdims=True)


def deviation(p_bar, mean, lse_bar=None):
    """p_bar less its mean, plus lse_bar: times p, the cotangent of the scores."""
    return p_bar - mean if lse_bar is None else p_bar - mean + lse_bar


def scores_bar(p, p_bar, mean, lse_bar=None):
    """Cotangent of the scores. (From p_dot_bar and lse_dot_bar, that of the scores' tangent.)"""
    return p * deviation(p_bar, mean, lse_bar)


def narrow(weights, dtype):
    """Weights in the dtype of a matrix product, and how much rounding took from each row's total, or None.

    Many weights sum to 0 over a row. Rounded they do not, and what all keys have in common would not cancel. So the
    caller, who sums keys by them, adds one of the keys times that loss.
    """
    rounded = weights.astype(dtype)
    if rounded.dtype == weights.dtype:
        return rounded, None
    return rounded, jnp.sum(weights - rounded.astype(weights.dtype), axis=-1, keepdims=True)
