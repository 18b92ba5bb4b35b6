"""One inner step: W_{i+1} = W_i - eta * s * g, with s = min(1, clip / |g|) (DESIGN section 3)."""

import jax
import jax.numpy as jnp

from ttt_e2e.config import InnerConfig


def inner_learning_rate(inner: InnerConfig, step):
    """Inner learning rate eta at outer step `step` (from 0, may be traced): a linear warm-up, then constant."""
    if inner.warmup_steps == 0:
        return jnp.float32(inner.learning_rate)
    progress = jnp.minimum(1.0, (step + 1) / inner.warmup_steps)
    return jnp.float32(inner.warmup_init + (inner.learning_rate - inner.warmup_init) * progress)


def clip_scale(gradient, clip_norm: float):
    """s = min(1, clip_norm / |gradient|) over all leaves; 1 where clip_norm is 0 (off).

    Both branches of the outer `where` must be finite for their derivatives to be: hence the inner one.
    """
    if clip_norm == 0:
        return jnp.float32(1.0)
    squared_norm = sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient))
    clipped = squared_norm > clip_norm**2
    return jnp.where(clipped, clip_norm * jax.lax.rsqrt(jnp.where(clipped, squared_norm, 1.0)), 1.0)


def sgd_update(fast, gradient, learning_rate, clip_norm: float):
    """The fast weights after one step of clipped SGD."""
    rate = learning_rate * clip_scale(gradient, clip_norm)
    return jax.tree.map(lambda w, g: w - (rate * g).astype(w.dtype), fast, gradient)
