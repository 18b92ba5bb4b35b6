"""The algebra of one tile of scores between its matrix products: softmax, centring and what reverses them.

Shared by tiles.py, where a tile holds all keys of its rows and the mean of a row is a sum over the tile, and by the
hardware kernels, which sweep a row's keys tile by tile and are given its mean, a dot product of rows (docs/kernels.md).
It stands in a file of its own because that is all the two have in common: their matrix products, and the order in which
things are summed, differ.

Shapes: scores [..., t, w] of t queries and w keys; row statistics [..., t, 1], or whatever else broadcasts. All in
float32 or wider, and nothing but jax.numpy on them, so that kernels may call it.
"""

import jax
import jax.numpy as jnp

# Finite, unlike finfo.min and -inf: with those the second derivative of a softmax is NaN.
MASKED_SCORE = -1e30


def wide(dtype):
    """The dtype of scores and statistics."""
    return jnp.promote_types(dtype, jnp.float32)


def mask(scores, visible):
    """Scores, and a very low one where a key is not seen."""
    return jnp.where(visible, scores, MASKED_SCORE)


def soften(scores):
    """Of rows that are here as a whole: unnormalised weights, the largest score, and the weights' total."""
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    return weights, largest, jnp.sum(weights, axis=-1, keepdims=True)


def soften_more(scores, largest, total):
    """The same of one more tile of rows, whose `largest` and `total` so far are given: MASKED_SCORE and 0 before any.

    Returns:
      Weights, largest, total, and the factor that takes sums over the tiles before to the new scale of weights. (What
      is summed while a row has seen nothing but masked keys is finite, and taken to 0 by its first visible one.)
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
    """Of each row, under its own softmax."""
    return jnp.sum(p * scores, axis=-1, keepdims=True)


def deviation(p_bar, mean, lse_bar=None):
    """Cotangent of the log-probabilities, up to the factor p, from the p_bar of a row whose mean is given."""
    return p_bar - mean if lse_bar is None else p_bar - mean + lse_bar


def scores_bar(p, p_bar, mean, lse_bar=None):
    """Cotangent of the scores. (That of the scores' tangent is the same of p_dot_bar and lse_dot_bar.)"""
    return p * deviation(p_bar, mean, lse_bar)


def narrow(weights, dtype):
    """Weights in the dtype of a matrix product, and what rounding took from each row's total; None where nothing.

    Many weights sum to 0 over a row: rounded they do not, and what all keys have in common would not cancel. Whoever
    sums keys by them gives the loss back at one of the keys.
    """
    rounded = weights.astype(dtype)
    if rounded.dtype == weights.dtype:
        return rounded, None
    return rounded, jnp.sum(weights - rounded.astype(weights.dtype), axis=-1, keepdims=True)
