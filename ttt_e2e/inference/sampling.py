"""Samples tokens from logits, by pure functions. Shapes: `B` sequences, `V` vocabulary."""

from functools import partial

import jax
import jax.numpy as jnp

from ttt_e2e.inference.settings import Sampling


@partial(jax.jit, static_argnames="sampling")
def choose(keys_B, index, logits_BV, seen_BV, sampling: Sampling):
    """Samples the next token of each sequence; at temperature 0, takes the likeliest one (greedy).

    Args:
      keys_B: one random key for each sequence, so that a sequence does not depend on the others in its batch.
      index: number of tokens sampled before; folded into the keys, so that each token has its own.
      logits_BV: logits that the model predicts.
      seen_BV: whether each token of the vocabulary occurred before in its sequence.
      sampling: temperature, top-k, top-p and repetition penalty.

    Returns:
      Token ids [B].
    """
    adjusted_BV = jax.vmap(partial(adjust, sampling=sampling))(logits_BV, seen_BV)
    if sampling.temperature == 0:
        return jnp.argmax(adjusted_BV, axis=-1)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, index)
    return jax.vmap(jax.random.categorical)(keys_B, adjusted_BV)


def adjust(logits_V, seen_V, sampling: Sampling):
    """Logits [V] to sample from, after penalty, temperature, top-k and top-p, in this order; -inf = excluded."""
    logits_V = penalise(logits_V, seen_V, sampling.repetition_penalty)
    if sampling.temperature > 0:
        logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        logits_V = keep_top_k(logits_V, sampling.top_k)
    return keep_top_p(logits_V, sampling.top_p) if sampling.top_p < 1 else logits_V


def penalise(logits_V, seen_V, penalty: float):
    """Applies the repetition penalty of CTRL (arXiv 1909.05858) to logits [V] of tokens that occurred before.

    Positive logits are divided by the penalty, negative ones multiplied by it.
    """
    return jnp.where(seen_V, jnp.where(logits_V > 0, logits_V / penalty, logits_V * penalty), logits_V)


def keep_top_k(logits_V, k: int):
    """Sets all logits [V] below the k-th highest to -inf; those equal to it are left, so that more than k may be."""
    return jnp.where(logits_V >= jax.lax.top_k(logits_V, k)[0][-1], logits_V, -jnp.inf)


def keep_top_p(logits_V, p: float):
    """Sets logits [V] to -inf outside the nucleus: the fewest likeliest tokens of total probability `p` or more.

    At least one token is left (nucleus sampling, arXiv 1904.09751).
    """
    order_V = jnp.argsort(-logits_V)
    probability_V = jax.nn.softmax(logits_V[order_V])
    before_V = jnp.cumsum(probability_V) - probability_V
    keep_V = jnp.zeros(len(logits_V), bool).at[order_V].set((before_V < p).at[0].set(True))
    return jnp.where(keep_V, logits_V, -jnp.inf)
