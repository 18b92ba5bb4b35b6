"""Reading a sequence: a scan over its mini-batches that scores each and then learns from it.

Pure functions of (fast, slow, tokens); `fast` and `slow` are nested dicts of arrays, the two halves of one
`nnx.split(model, FastParam, ...)`, and `graphdef` is its static third. Everything is written for one sequence and
batched by the caller with `jax.vmap`, so that each sequence has fast weights of its own.

Shapes: `T` sequence, `b` inner mini-batch, `D` model width, `M` mini-batches of the sequence.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.config import InnerConfig
from ttt_e2e.inner.step import sgd_update
from ttt_e2e.model import Transformer
from ttt_e2e.model.loss import masked_mean
from ttt_e2e.model.parameters import at_least_float32, merge


class Reading(NamedTuple):
    """What reading a sequence gives: its losses, and the fast weights it leaves behind."""

    loss: jax.Array  # mean over mini-batches
    mini_batch_loss_M: jax.Array  # mean over the unmasked targets of each
    token_nll_T: jax.Array  # unmasked, each token scored before its mini-batch was learned from
    fast: Any


def read_sequence(graphdef, fast, slow, tokens, *, inner: InnerConfig, learning_rate, bos_id: int) -> Reading:
    """Reads tokens [T + 1]: predicts each of the last T from those before it, learning after every mini-batch.

    Args:
      graphdef: static structure of the `Transformer`.
      fast: initial fast weights W_0 (empty for a model without).
      slow: slow weights.
      tokens: integers [T + 1]; T must be a multiple of `inner.mini_batch_size`.
      inner: the inner loop's configuration; `inner.gradient` chooses what the meta-gradient sees.
      learning_rate: eta, may be traced; 0 reads without learning.
      bos_id: targets equal to it do not count in the loss; 0 = all count.

    Differentiable in `fast` and `slow`: the result is the meta-gradient, by autodiff through the scan.
    """
    model = merge(graphdef, fast, slow)
    inputs_T, targets_T = tokens[:-1], tokens[1:]
    is_target_T = targets_T != bos_id if bos_id else jnp.ones_like(targets_T, dtype=bool)
    x_TD = model.run_prefix(model.embed(inputs_T))
    b = inner.mini_batch_size
    if not model.config.num_fast_blocks:
        nll_T = model.nll(x_TD, targets_T)
        loss_M = masked_mean(nll_T.reshape(-1, b), is_target_T.reshape(-1, b))
        return Reading(loss_M.mean(), loss_M, nll_T, fast)

    fast = jax.tree.map(lambda w: w.astype(at_least_float32(w.dtype)), fast)
    x_MbD, targets_Mb, is_target_Mb = (a.reshape(-1, b, *a.shape[1:]) for a in (x_TD, targets_T, is_target_T))

    def mini_batch_loss(fast, cache, x_bD, targets_b, is_target_b, num_empty):
        model: Transformer = merge(graphdef, fast, slow)
        x_bD, new = model.run_suffix(x_bD, cache, num_empty)
        nll_b = model.nll(x_bD, targets_b)
        return masked_mean(nll_b, is_target_b), (nll_b, new)

    # One rematerialisation per mini-batch: of all residuals, only the carry and the inputs are kept. (Inside a scan
    # nothing can be merged across the boundary anyway, so the barrier that prevents it is left out.)
    @partial(jax.checkpoint, prevent_cse=False)
    def inner_step(carry, mini_batch):
        fast, cache, num_empty = carry
        (loss, (nll_b, new)), gradient = jax.value_and_grad(mini_batch_loss, has_aux=True)(
            fast, cache, *mini_batch, num_empty
        )
        if inner.gradient == "first_order":
            gradient = jax.lax.stop_gradient(gradient)
        fast = sgd_update(fast, gradient, learning_rate, inner.clip_norm)
        return (fast, cache.append(new), jnp.maximum(num_empty - b, 0)), (loss, nll_b)

    cache = model.empty_cache(seq_len=inputs_T.shape[0])
    carry = (fast, cache, jnp.int32(cache.k.shape[1]))
    (fast, _, _), (loss_M, nll_Mb) = jax.lax.scan(inner_step, carry, (x_MbD, targets_Mb, is_target_Mb))
    return Reading(loss_M.mean(), loss_M, nll_Mb.reshape(-1), fast)
