"""One inner step: W_{i+1} = W_i - eta * s * g, with s = min(1, clip / |g|).

Shapes: `b` inner mini-batch, `D` model width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.config import InnerConfig
from ttt_e2e.model.dual_loss import head_pass
from ttt_e2e.model.loss import masked_mean
from ttt_e2e.model.mixers import Context
from ttt_e2e.model.parameters import merge
from ttt_e2e.model.parts import copy_to_all, sum_to_all


class MiniBatch(NamedTuple):
    """Input of an inner step. Stacked ones have leading axes [B], [B, M] or [M, B]: sequences, mini-batches."""

    hidden: jax.Array  # [b, D], hidden states after the prefix
    targets: jax.Array  # [b]
    is_target: jax.Array  # [b], False where a target does not count


def mini_batch_loss(suffix_def, fast, slow, states: dict, context: Context, mini_batch: MiniBatch):
    """Mean NLL over the unmasked targets, and (NLL [b] of all targets, the mixers' States after the mini-batch)."""
    suffix = merge(suffix_def, fast, slow)
    x_bD, entries, _ = suffix.extend(mini_batch.hidden, states, context)
    nll_b = suffix.nll(x_bD, mini_batch.targets)
    return masked_mean(nll_b, mini_batch.is_target), (nll_b, suffix.advance(states, entries))


def inner_gradient(run, fast, head_DV, mini_batch: MiniBatch, vocab_size: int):
    """Gradient of loss_i at the fast weights, the head's forward pass, and what `run` gives besides.

    run: fast -> (normed hidden states of the mini-batch, anything else). Of one mini-batch, or of one of each sequence
        of a batch; `fast` and the arrays of the mini-batch then have a leading axis B.
    """
    hidden_bD, pull_back, others = jax.vjp(run, fast, has_aux=True)
    head = head_pass(hidden_bD, head_DV, mini_batch.targets, vocab_size)
    weight_b = target_weights(mini_batch.is_target, head.nll_T.dtype)
    (gradient,) = pull_back((weight_b[..., None] * head.gradient_TD).astype(hidden_bD.dtype))
    return gradient, head, others


def target_weights(is_target_b, dtype):
    """Weight of each token in the mini-batch's loss (last axis): 1 / (number of unmasked targets), or 0."""
    count = jnp.maximum(is_target_b.sum(axis=-1, keepdims=True), 1)
    return is_target_b.astype(dtype) / count


def inner_learning_rate(inner: InnerConfig, step):
    """Inner learning rate eta at outer step `step` (from 0, may be traced): a linear warm-up, then constant."""
    if inner.warmup_steps == 0:
        return jnp.float32(inner.learning_rate)
    progress = jnp.minimum(1.0, (step + 1) / inner.warmup_steps)
    return jnp.float32(inner.warmup_init + (inner.learning_rate - inner.warmup_init) * progress)


def inner_product(a, b, divided: bool = False):
    """<a, b> over all leaves; `divided`: each device has its part of them, and all get the sum.

    Not by `jnp.vdot`, which ravels: under a division by the compiler, a divided matrix would be put together for that.
    """
    terms = [jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return copy_to_all(sum_to_all(sum(terms), divided), divided)


def clip_scale(gradient, clip_norm: float, divided: bool = False):
    """s = min(1, clip_norm / |gradient|) over all leaves, as of `inner_product`; 1 where clip_norm is 0 (off).

    Both branches of the outer `where` must be finite for their derivatives to be: hence the inner one.
    """
    if clip_norm == 0:
        return jnp.ones((), jax.tree.leaves(gradient)[0].dtype)
    squared_norm = inner_product(gradient, gradient, divided)
    clipped = squared_norm > clip_norm**2
    return jnp.where(clipped, clip_norm * jax.lax.rsqrt(jnp.where(clipped, squared_norm, 1.0)), 1.0)


def sgd_update(fast, gradient, rate):
    """W - rate * g. `rate` is the learning rate times the clip scale."""
    return jax.tree.map(lambda w, g: w - (rate * g).astype(w.dtype), fast, gradient)


def is_cut(inner: InnerConfig, i):
    """Whether truncation stops the meta-gradient at the update that leads to mini-batch i (may be traced)."""
    return (i > 0) & (i % inner.truncate == 0)
