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
from ttt_e2e.inner import meta_gradient, reference
from ttt_e2e.inner.division import MODEL, UNDIVIDED, Division, Weights, embed, fetch, fetch_block, gather_alike
from ttt_e2e.inner.step import MiniBatch, is_target
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
    mini_batches = make_mini_batches(model, tokens, inner, bos_id, division)
    B, M, b = mini_batches.targets_b.shape
    if not model.config.num_fast_blocks:
        nll_BT = _static_nll(model, division, mini_batches)
        loss_BM = masked_mean(nll_BT.reshape(B, M, b), mini_batches.is_target_b)
        return Reading(loss_BM.mean(axis=1), loss_BM, nll_BT, fast)

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
    return Reading(loss_BM.mean(axis=1), loss_BM, nll_BMb.reshape(B, M * b), fast)


def make_mini_batches(
    model: Transformer, tokens, inner: InnerConfig, bos_id: int, division: Division = UNDIVIDED
) -> MiniBatch:
    """Runs the prefix over sequences [B, T + 1] and divides what comes out: arrays with leading axes [B, M].

    Where the prefix divides positions over devices, the hidden states of a model with a suffix are put together once,
    here; those of a model without are this device's part, [B, Q, D] without a division into mini-batches.
    """
    inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
    config = model.config
    x_BQD = embed(division, model.embedding[...], inputs_BT, config.vocab_size, jnp.dtype(config.compute_dtype))
    parts = SequenceParts(division.num_parts) if division.by_sequence else None

    def fetch_weights(stack, state):
        return fetch_block(division.slow.of(stack), state)

    run_prefix = partial(model.run_prefix, remat=inner.remat != "keep", fetch=fetch_weights, parts=parts)
    x_BQD = jax.vmap(run_prefix)(x_BQD)
    B, b = len(tokens), inner.mini_batch_size
    of_targets = (a.reshape(B, -1, b) for a in (targets_BT, is_target(targets_BT, bos_id)))
    if division.by_sequence and not config.num_fast_blocks:
        return MiniBatch(x_BQD, *of_targets)
    x_BTD = gather_alike(x_BQD, 1, division.num_parts) if division.by_sequence else x_BQD
    return MiniBatch(x_BTD.reshape(B, -1, b, x_BTD.shape[-1]), *of_targets)


def suffix_weights(division: Division, slow) -> Weights:
    """Layouts of the slow weights of a model's `Suffix`, by the names in `slow`."""
    if division.slow.leaves is None:
        return division.slow
    leaves = {name: division.head.leaves if name == "head" else division.slow.leaves[name] for name in slow}
    return division.slow._replace(leaves=leaves)


def _static_nll(model: Transformer, division: Division, mini_batches: MiniBatch):
    """NLL [B, T] of a model without a suffix, from its hidden states."""
    B, T = len(mini_batches.targets_b), mini_batches.targets_b[0].size
    x_BQD = model.final_norm(mini_batches.x_bD.reshape(B, -1, model.config.hidden_size))
    if division.by_sequence:
        x_BTD = jax.lax.all_gather(x_BQD, MODEL, axis=1, tiled=True)  # cotangents are terms of a sum
    else:
        x_BTD = copy_to_all(x_BQD, division.num_parts > 1)
    x_RD, targets_R = x_BTD.reshape(B * T, -1), mini_batches.targets_b.reshape(-1)
    return _head_nll(division.head, model.config.vocab_size, x_RD, model.head_DV, targets_R).reshape(B, T)


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
