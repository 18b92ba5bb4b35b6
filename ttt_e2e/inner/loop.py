"""Reading a sequence: score each mini-batch, then learn from it.

Pure functions of (fast, slow, tokens). `fast` and `slow` are nested dicts of arrays; they and the static `graphdef` are
what `split(model)` returns.

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
    """Result of reading a sequence. That of a batch has a leading axis B in every array."""

    loss: jax.Array  # mean over mini-batches
    mini_batch_loss_M: jax.Array  # mean over the unmasked targets of each mini-batch
    token_nll_T: jax.Array  # of masked targets, too; each token is scored before its mini-batch is learned from
    fast: Any  # fast weights after the last mini-batch


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
    """Reads B sequences: predicts each of the last T tokens from those before it, and learns after every mini-batch.

    Args:
      graphdef: static structure of the `Transformer`.
      fast: initial fast weights W_0, with a leading axis B: each sequence changes its own copy.
      slow: slow weights, or this device's shards of them.
      tokens: integers [B, T + 1]; T must be a multiple of `inner.mini_batch_size`.
      inner: the inner loop's configuration; `inner.gradient` chooses how the meta-gradient is computed. Its policies
        must not be "auto" (memory.py resolves it).
      learning_rate: eta, may be traced; 0 reads without learning. The meta-gradient treats it as a constant.
      bos_id: targets equal to it are masked in the loss, as `is_target` takes it; 0 = none is.
      division: how arrays are divided among devices.

    Differentiable in `fast` and `slow`, once, in reverse: the result is the meta-gradient.
    """
    if "auto" in (inner.trajectory, inner.remat):
        raise ValueError("inner.trajectory and inner.remat are still 'auto': see inner/memory.py")
    model = merge(graphdef, fast, slow)
    x_BQD = run_prefix(model, tokens, inner, division)
    if not model.config.num_fast_blocks:
        nll_BT = _nll_without_suffix(model, division, x_BQD, tokens[:, 1:])
        nll_BMb, targets_BMb = (a.reshape(len(tokens), -1, inner.mini_batch_size) for a in (nll_BT, tokens[:, 1:]))
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


def read_sequence(graphdef, fast, slow, tokens, **options) -> Reading:
    """Reads one sequence, tokens [T + 1]: `read_batch` without the leading axis B in `fast` and in the result."""
    reading = read_batch(graphdef, jax.tree.map(lambda w: w[None], fast), slow, tokens[None], **options)
    return jax.tree.map(lambda a: a[0], reading)


def run_prefix(model: Transformer, tokens, inner: InnerConfig, division: Division = UNDIVIDED):
    """Runs embedding and prefix on tokens [B, T + 1]; returns hidden states [B, Q, D] of this device's positions."""
    config = model.config
    x_BQD = embed(division, model.embedding[...], tokens[:, :-1], config.vocab_size, jnp.dtype(config.compute_dtype))
    parts = SequenceParts(division.num_parts) if division.by_sequence else None

    def fetch_weights(stack, state):
        return fetch_block(division.slow.of(stack), state)

    run = partial(model.run_prefix, remat=inner.remat != "keep", fetch=fetch_weights, parts=parts)
    return jax.vmap(run)(x_BQD, tokens[:, :-1])


def make_mini_batches(x_BQD, tokens, inner: InnerConfig, bos_id: int, division: Division = UNDIVIDED) -> MiniBatch:
    """Cuts sequences into mini-batches: arrays with leading axes [B, M].

    Where the prefix ran on divided positions (Q < T), all devices gather the hidden states here, once.
    """
    x_BTD = gather_alike(x_BQD, 1, division.num_parts) if division.by_sequence else x_BQD
    x_BMbD, targets_BMb = (
        a.reshape(len(tokens), -1, inner.mini_batch_size, *a.shape[2:]) for a in (x_BTD, tokens[:, 1:])
    )
    return MiniBatch(x_BMbD, targets_BMb, is_target(targets_BMb, bos_id))


def suffix_weights(division: Division, slow) -> Weights:
    """Selects the layouts of the slow weights of a model's `Suffix`, by the names in `slow`."""
    if division.slow.leaves is None:
        return division.slow
    leaves = {name: division.head.leaves if name == "head" else division.slow.leaves[name] for name in slow}
    return division.slow._replace(leaves=leaves)


def _nll_without_suffix(model: Transformer, division: Division, x_BQD, targets_BT):
    """Computes the NLL [B, T] of a model without fast weights, from the last block's hidden states."""
    x_BQD = model.final_norm(x_BQD)
    if division.by_sequence:
        x_BTD = jax.lax.all_gather(x_BQD, MODEL, axis=1, tiled=True)  # in reverse: a sum over the devices
    else:
        x_BTD = copy_to_all(x_BQD, division.num_parts > 1)
    x_RD, targets_R = x_BTD.reshape(targets_BT.size, -1), targets_BT.reshape(-1)
    nll_R = _head_nll(division.head, model.config.vocab_size, x_RD, model.head_DV, targets_R)
    return nll_R.reshape(targets_BT.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head_nll(weights: Weights, vocab_size: int, x_RD, head_DV, targets_R):
    """Computes the NLL [R] of rows, given the head as it is stored (sharded); differentiable once, in reverse.

    A custom VJP, so that the head is gathered once and its cotangents are scattered once, after all blocks of rows.
    """
    return _head_nll_forward(weights, vocab_size, x_RD, head_DV, targets_R)[0]


def _head_nll_forward(weights: Weights, vocab_size: int, x_RD, head_DV, targets_R):
    whole_DC = weights.whole(head_DV)
    nll_R, softmax = nll_forward(x_RD, whole_DC, targets_R, vocab_size)
    return nll_R, (x_RD, whole_DC, targets_R, softmax, jnp.zeros((), head_DV.dtype))


def _head_nll_reverse(weights: Weights, vocab_size: int, residuals, nll_bar_R):
    *operands, stored_dtype = residuals  # the dtype as that of a scalar, since residuals are arrays
    x_bar_RD, head_bar_DC = nll_reverse(*operands, nll_bar_R, vocab_size)
    return x_bar_RD, weights.reduced(head_bar_DC.astype(stored_dtype.dtype)), None


_head_nll.defvjp(_head_nll_forward, _head_nll_reverse)
