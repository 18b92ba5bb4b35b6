"""From logits to a token: pure functions. Shapes: `B` sequences, `V` vocabulary."""

from functools import partial

import jax
import jax.numpy as jnp

from ttt_e2e.inference.settings import Sampling


@partial(jax.jit, static_argnames="sampling")
def choose(keys_B, index, logits_BV, seen_BV, sampling: Sampling):
    """Chooses a token for each sequence.

    Args:
      keys_B: random keys, one a sequence, so that none depends on which others there are.
      index: how many tokens were chosen before, which makes another draw of the same keys.
      logits_BV: the model's prediction.
      seen_BV: whether each token of the vocabulary was there before.
      sampling: how.

    Returns:
      tokens [B].
    """
    adjusted_BV = jax.vmap(partial(adjust, sampling=sampling))(logits_BV, seen_BV)
    if sampling.temperature == 0:
        return jnp.argmax(adjusted_BV, axis=-1)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, index)
    return jax.vmap(jax.random.categorical)(keys_B, adjusted_BV)


def adjust(logits_V, seen_V, sampling: Sampling):
    """The logits to draw from: penalty, temperature, top-k, top-p, in this order; -inf where nothing is left."""
    logits_V = penalise(logits_V, seen_V, sampling.repetition_penalty)
    if sampling.temperature > 0:
        logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        logits_V = keep_top_k(logits_V, sampling.top_k)
    return keep_top_p(logits_V, sampling.top_p) if sampling.top_p < 1 else logits_V


def penalise(logits_V, seen_V, penalty: float):
    """Logits of tokens that were there before, divided by the penalty, or multiplied where negative (CTRL)."""
    return jnp.where(seen_V, jnp.where(logits_V > 0, logits_V / penalty, logits_V * penalty), logits_V)


def keep_top_k(logits_V, k: int):
    """-inf for all but the k highest, and those equal to the lowest of them."""
    return jnp.where(logits_V >= jax.lax.top_k(logits_V, k)[0][-1], logits_V, -jnp.inf)


def keep_top_p(logits_V, p: float):
    """-inf for all but the fewest of the highest whose probabilities reach `p` together; one at least is left."""
    order_V = jnp.argsort(-logits_V)
    probability_V = jax.nn.softmax(logits_V[order_V])
    before_V = jnp.cumsum(probability_V) - probability_V
    keep_V = jnp.zeros(len(logits_V), bool).at[order_V].set((before_V < p).at[0].set(True))
    return jnp.where(keep_V, logits_V, -jnp.inf)
