"""Reading a sequence: score each mini-batch, then learn from it.

Pure functions of (fast, slow, tokens); `fast` and `slow` are nested dicts of arrays, the two halves of one
`split(model)`, and `graphdef` is its static third. Everything is written for one sequence and batched by the caller
with `jax.vmap`, so that each sequence has fast weights of its own.

Shapes: `T` sequence, `b` inner mini-batch, `D` model width, `M` mini-batches of the sequence.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.config import InnerConfig
from ttt_e2e.inner import meta_gradient, reference
from ttt_e2e.inner.step import MiniBatch
from ttt_e2e.model.loss import masked_mean
from ttt_e2e.model.parameters import at_least_float32, merge, split


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
      inner: the inner loop's configuration; `inner.gradient` chooses how the meta-gradient is computed.
      learning_rate: eta, may be traced; 0 reads without learning. A constant to the meta-gradient.
      bos_id: targets equal to it do not count in the loss; 0 = all count.

    Differentiable in `fast` and `slow`, in reverse: the result is the meta-gradient.
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

    suffix_def, fast, slow = split(model.make_suffix())
    fast = jax.tree.map(lambda w: w.astype(at_least_float32(w.dtype)), fast)
    mini_batches = MiniBatch(*(a.reshape(-1, b, *a.shape[1:]) for a in (x_TD, targets_T, is_target_T)))
    adapt = reference.adapt if inner.gradient == "reference" else meta_gradient.adapt
    loss_M, nll_Mb, fast = adapt(suffix_def, inner, fast, slow, mini_batches, jax.lax.stop_gradient(learning_rate))
    return Reading(loss_M.mean(), loss_M, nll_Mb.reshape(-1), {"suffix": fast["blocks"]})
