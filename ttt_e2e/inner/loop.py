"""Reading a sequence: score each mini-batch, then learn from it.

Pure functions of (fast, slow, tokens); `fast` and `slow` are nested dicts of arrays, the two halves of one
`split(model)`, and `graphdef` is its static third.

Shapes: `B` sequences, `T` tokens of a sequence, `Q` of a device's part of it, `M` mini-batches of a sequence, `b` inner
mini-batch, `R` = B T rows, `D` model width, `V` vocabulary.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.config import InnerConfig
from ttt_e2e.data.masking import is_target
from ttt_e2e.inner import meta_gradient, reference
from ttt_e2e.inner.division import MODEL, UNDIVIDED, Division, Weights, embed, fetch, fetch_block, gather_alike
from ttt_e2e.inner.step import MiniBatch
from ttt_e2e.model import Transformer
from ttt_e2e.model.loss import masked_mean, nll_forward, nll_reverse
from ttt_e2e.model.parameters import at_least_float32, merge, split
from ttt_e2e.model.parts import copy_to_all
from ttt_e2e.model.sequence_parts import SequenceParts


class Reading(NamedTuple):
    """Result of reading: losses, and the fast weights after the last mini-batch; of a batch, with a leading axis B."""

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
    division: Division = UNDIVIDED,
) -> Reading:
    """Reads B sequences: predicts each of their last T tokens from those before it, learning after every mini-batch.

    Args:
      graphdef: static structure of the `Transformer`.
      fast: initial fast weights W_0 with a leading axis over sequences, each of which changes its own.
      slow: slow weights; what this device stores of them.
      tokens: integers [B, T + 1]; T must be a multiple of `inner.mini_batch_size`.
      inner: the inner loop's configuration; `inner.gradient` chooses how the meta-gradient is computed. Its policies
        must not be "auto" (memory.py).
      learning_rate: eta, may be traced; 0 reads without learning. A constant to the meta-gradient.
      bos_id: targets equal to it do not count in the loss; 0 = all count.
      division: how devices share the work, where they do.

    Differentiable in `fast` and `slow`, in reverse: the result is the meta-gradient.
    """
    if "auto" in (inner.trajectory, inner.remat):
        raise ValueError("inner.trajectory and inner.remat are still 'auto': see inner/memory.py")
    model = merge(graphdef, fast, slow)
    x_BQD = run_prefix(model, tokens, inner, division)
    if not model.config.num_fast_blocks:
        nll_BT, b = _static_nll(model, division, x_BQD, tokens[:, 1:]), inner.mini_batch_size
        nll_BMb, targets_BMb = (a.reshape(len(tokens), -1, b) for a in (nll_BT, tokens[:, 1:]))
        loss_BM = masked_mean(nll_BMb, is_target(targets_BMb, bos_id))
        return Reading(loss_BM.mean(axis=1), loss_BM, nll_BT, fast)

    mini_batches = make_mini_batches(x_BQD, tokens, inner, bos_id, division)
    suffix_def, fast, slow = split(model.make_suffix())
    fast = jax.tree.map(lambda w: w.astype(at_least_float32(w.dtype)), fast)
    weights = suffix_weights(division, slow)
    learning_rate = jax.lax.stop_gradient(learning_rate)
    if inner.gradient == "reference":
        adapt = jax.vmap(partial(reference.adapt, suffix_def, inner), in_axes=(0, None, 0, None))
        loss_BM, nll_BMb, fast = adapt(fast, fetch(weights, slow), mini_batches, learning_rate)
    else:
        adapt = partial(meta_gradient.adapt, suffix_def, inner, weights)
        loss_BM, nll_BMb, fast = adapt(fast, slow, mini_batches, learning_rate)
    return Reading(loss_BM.mean(axis=1), loss_BM, nll_BMb.reshape(len(tokens), -1), fast)


def run_prefix(model: Transformer, tokens, inner: InnerConfig, division: Division = UNDIVIDED):
    """Hidden states [B, Q, D] after the prefix, of the positions that are this device's, given tokens [B, T + 1]."""
    config = model.config
    x_BQD = embed(division, model.embedding[...], tokens[:, :-1], config.vocab_size, jnp.dtype(config.compute_dtype))
    parts = SequenceParts(division.num_parts) if division.by_sequence else None

    def fetch_weights(stack, state):
        return fetch_block(division.slow.of(stack), state)

    run = partial(model.run_prefix, remat=inner.remat != "keep", fetch=fetch_weights, parts=parts)
    return jax.vmap(run)(x_BQD)


def make_mini_batches(x_BQD, tokens, inner: InnerConfig, bos_id: int, division: Division = UNDIVIDED) -> MiniBatch:
    """Cuts sequences into mini-batches: arrays with leading axes [B, M].

    Where devices have other positions each, the hidden states are put together once, here.
    """
    x_BTD = gather_alike(x_BQD, 1, division.num_parts) if division.by_sequence else x_BQD
    x_BMbD, targets_BMb = (
        a.reshape(len(tokens), -1, inner.mini_batch_size, *a.shape[2:]) for a in (x_BTD, tokens[:, 1:])
    )
    return MiniBatch(x_BMbD, targets_BMb, is_target(targets_BMb, bos_id))


def suffix_weights(division: Division, slow) -> Weights:
    """Layouts of the slow weights of a model's `Suffix`, by the names in `slow`."""
    if division.slow.leaves is None:
        return division.slow
    leaves = {name: division.head.leaves if name == "head" else division.slow.leaves[name] for name in slow}
    return division.slow._replace(leaves=leaves)


def _static_nll(model: Transformer, division: Division, x_BQD, targets_BT):
    """NLL [B, T] of a model without a suffix, from its hidden states."""
    x_BQD = model.final_norm(x_BQD)
    if division.by_sequence:
        x_BTD = jax.lax.all_gather(x_BQD, MODEL, axis=1, tiled=True)  # cotangents are terms of a sum
    else:
        x_BTD = copy_to_all(x_BQD, division.num_parts > 1)
    x_RD, targets_R = x_BTD.reshape(targets_BT.size, -1), targets_BT.reshape(-1)
    nll_R = _head_nll(division.head, model.config.vocab_size, x_RD, model.head_DV, targets_R)
    return nll_R.reshape(targets_BT.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head_nll(weights: Weights, vocab_size: int, x_RD, head_DV, targets_R):
    """NLL [R] of rows, given the head as it is stored; differentiable once, in reverse."""
    return _head_nll_forward(weights, vocab_size, x_RD, head_DV, targets_R)[0]


def _head_nll_forward(weights: Weights, vocab_size: int, x_RD, head_DV, targets_R):
    whole_DC = weights.whole(head_DV)
    nll_R, softmax = nll_forward(x_RD, whole_DC, targets_R, vocab_size)
    return nll_R, (x_RD, whole_DC, targets_R, softmax, jnp.zeros((), head_DV.dtype))


def _head_nll_reverse(weights: Weights, vocab_size: int, residuals, nll_bar_R):
    *operands, like = residuals
    x_bar_RD, head_bar_DC = nll_reverse(*operands, nll_bar_R, vocab_size)
    return x_bar_RD, weights.reduced(head_bar_DC.astype(like.dtype)), None


_head_nll.defvjp(_head_nll_forward, _head_nll_reverse)


def read_sequence(graphdef, fast, slow, tokens, **options) -> Reading:
    """`read_batch` of one sequence: tokens [T + 1], and no leading axis in `fast` and in the result."""
    reading = read_batch(graphdef, jax.tree.map(lambda w: w[None], fast), slow, tokens[None], **options)
    return jax.tree.map(lambda a: a[0], reading)
