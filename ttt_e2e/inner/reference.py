"""The inner loop with plain autodiff through it: what the production path is tested against.

Shapes: `M` mini-batches of the sequence, `b` inner mini-batch.
"""

from functools import partial

import jax
import jax.numpy as jnp

from ttt_e2e.config import InnerConfig
from ttt_e2e.inner.step import MiniBatch, clip_scale, is_cut, mini_batch_loss, sgd_update
from ttt_e2e.model.mixers import Context
from ttt_e2e.model.parameters import structure_of


def adapt(suffix_def, inner: InnerConfig, fast, slow, mini_batches: MiniBatch, learning_rate):
    """Reads all mini-batches in turn; returns (losses [M], NLL [M, b], final fast weights).

    One rematerialisation per mini-batch: of all residuals, only the carry and the inputs are kept. (Inside a scan
    nothing can be merged across the boundary anyway, so the barrier that prevents it is left out.)
    """
    carry, steps, inner_step = inner_loop(suffix_def, inner, fast, slow, mini_batches, learning_rate)
    (fast, _), (loss_M, nll_Mb) = jax.lax.scan(jax.checkpoint(inner_step, prevent_cse=False), carry, steps)
    return loss_M, nll_Mb, fast


def inner_loop(suffix_def, inner: InnerConfig, fast, slow, mini_batches: MiniBatch, learning_rate):
    """The operands of `jax.lax.scan`: first carry (W_0, States before anything was read), steps, function of both."""
    M, b, _ = mini_batches.hidden.shape
    suffix = structure_of(suffix_def, fast, slow).module

    def inner_step(carry, step):
        fast, states = carry
        mini_batch, i = step
        if inner.truncate:
            fast = jax.tree.map(lambda w: jnp.where(is_cut(inner, i), jax.lax.stop_gradient(w), w), fast)
        (loss_i, (nll_b, next_states)), gradient = jax.value_and_grad(
            partial(mini_batch_loss, suffix_def), has_aux=True
        )(fast, slow, states, Context(start=i * b), mini_batch)
        rate = learning_rate * clip_scale(gradient, inner.clip_norm, suffix.divides_fast)
        return (sgd_update(fast, gradient, rate), next_states), (loss_i, nll_b)

    return (fast, suffix.empty(M * b)), (mini_batches, jnp.arange(M)), inner_step
