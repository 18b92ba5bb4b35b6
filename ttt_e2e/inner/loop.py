"""Reading a sequence: score each mini-batch, then learn from it.

Pure functions of (fast, slow, tokens); `fast` and `slow` are nested dicts of arrays, the two halves of one
`split(model)`, and `graphdef` is its static third.

Shapes: `B` sequences, `T` tokens of a sequence, `M` mini-batches of a sequence, `b` inner mini-batch, `D` model width.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from ttt_e2e.config import InnerConfig
from ttt_e2e.inner import meta_gradient, reference
from ttt_e2e.inner.step import MiniBatch
from ttt_e2e.model import Transformer
from ttt_e2e.model.loss import masked_mean
from ttt_e2e.model.parameters import at_least_float32, merge, split


class Reading(NamedTuple):
    """What reading gives: losses, and the fast weights it leaves behind; for a batch, with a leading axis B."""

    loss: jax.Array  # mean over mini-batches
    mini_batch_loss_M: jax.Array  # mean over the unmasked targets of each
    token_nll_T: jax.Array  # unmasked, each token scored before its mini-batch was learned from
    fast: Any


def read_batch(
    graphdef,
    fast,
    slow,
    tokens,
    *,
    inner: InnerConfig,
    learning_rate,
    bos_id: int,
    batch_sharding: Sharding | None = None,
) -> Reading:
    """Reads B sequences: predicts each of their last T tokens from those before it, learning after every mini-batch.

    Args:
      graphdef: static structure of the `Transformer`.
      fast: initial fast weights W_0 with a leading axis over sequences, each of which changes its own.
      slow: slow weights.
      tokens: integers [B, T + 1]; T must be a multiple of `inner.mini_batch_size`.
      inner: the inner loop's configuration; `inner.gradient` chooses how the meta-gradient is computed. Its policies
        must not be "auto" (memory.py).
      learning_rate: eta, may be traced; 0 reads without learning. A constant to the meta-gradient.
      bos_id: targets equal to it do not count in the loss; 0 = all count.
      batch_sharding: of arrays whose first axis counts sequences, where devices share them. Hidden states are held to
        it: XLA would divide them as the weights are divided, and then every device reads every sequence.

    Differentiable in `fast` and `slow`, in reverse: the result is the meta-gradient.
    """
    if "auto" in (inner.trajectory, inner.remat):
        raise ValueError("inner.trajectory and inner.remat are still 'auto': see inner/memory.py")
    model = merge(graphdef, fast, slow)
    mini_batches = make_mini_batches(model, tokens, inner, bos_id, batch_sharding)
    B, M, b = mini_batches.targets_b.shape
    if not model.config.num_fast_blocks:
        x_BTD, targets_BT = (a.reshape(B, M * b, *a.shape[3:]) for a in mini_batches[:2])
        nll_BT = jax.vmap(model.nll)(x_BTD, targets_BT)
        loss_BM = masked_mean(nll_BT.reshape(B, M, b), mini_batches.is_target_b)
        return Reading(loss_BM.mean(axis=1), loss_BM, nll_BT, fast)

    suffix_def, fast, slow = split(model.make_suffix())
    fast = jax.tree.map(lambda w: w.astype(at_least_float32(w.dtype)), fast)
    learning_rate = jax.lax.stop_gradient(learning_rate)
    if inner.gradient == "reference":
        adapt = jax.vmap(partial(reference.adapt, suffix_def, inner), in_axes=(0, None, 0, None))
        loss_BM, nll_BMb, fast = adapt(fast, slow, mini_batches, learning_rate)
    else:
        loss_BM, nll_BMb, fast = meta_gradient.adapt(suffix_def, inner, fast, slow, mini_batches, learning_rate)
    return Reading(loss_BM.mean(axis=1), loss_BM, nll_BMb.reshape(B, M * b), {"suffix": fast["blocks"]})


def make_mini_batches(
    model: Transformer, tokens, inner: InnerConfig, bos_id: int, batch_sharding: Sharding | None = None
) -> MiniBatch:
    """Runs the prefix over sequences [B, T + 1] and divides what comes out: arrays with leading axes [B, M]."""

    def place(x_BTD):
        return x_BTD if batch_sharding is None else jax.lax.with_sharding_constraint(x_BTD, batch_sharding)

    inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
    is_target_BT = targets_BT != bos_id if bos_id else jnp.ones_like(targets_BT, dtype=bool)
    run_prefix = partial(model.run_prefix, remat=inner.remat != "keep")
    x_BTD = place(jax.vmap(run_prefix)(place(jax.vmap(model.embed)(inputs_BT))))
    B, b = len(tokens), inner.mini_batch_size
    return MiniBatch(*(a.reshape(B, -1, b, *a.shape[2:]) for a in (x_BTD, targets_BT, is_target_BT)))


def read_sequence(graphdef, fast, slow, tokens, **options) -> Reading:
    """`read_batch` of one sequence: tokens [T + 1], and no leading axis in `fast` and in the result."""
    reading = read_batch(graphdef, jax.tree.map(lambda w: w[None], fast), slow, tokens[None], **options)
    return jax.tree.map(lambda a: a[0], reading)
