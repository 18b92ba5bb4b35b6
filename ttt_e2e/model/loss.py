"""Next-token loss, without all logits in memory at once.

There are two forms, with equal results. `token_nll` is plain autodiff, differentiable any number of times: for the
inner loop's reference, first-order gradients and inference. `nll_forward` and `nll_reverse` are a forward pass and its
reverse, written out: for models without fast weights. (dual_loss.py has a third, with tangents.)

The head may be one device's columns of it (vocabulary parallelism, parts.py): the vocabulary, padded to a multiple of
the devices, is divided evenly among them, in order. `vocab_size` is the number of columns without padding; 0 = all of
the head's, which is then whole.

Shapes: `T` positions, `R` rows (positions of several sequences), `r` rows of a block, `D` model width, `V` vocabulary,
`C` columns of the head on this device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.model.parameters import at_least_float32
from ttt_e2e.model.parts import AXIS, copy_to_all, sum_to_all

# Logits held at once: 2^24 float32 values are 64 MiB.
MAX_LOGITS = 2**24
# Rows of a block of `nll_forward` at least, even if their logits are more than MAX_LOGITS: with fewer rows, an
# accelerator is bound by the memory traffic of the head and its gradient, not by the products.
MIN_ROWS = 1024
MASKED_LOGIT = -1e30  # of padding; finite, since all columns of a device may be padding


class Columns(NamedTuple):
    """The columns of the head that this device computes with."""

    head_DC: jax.Array
    vocab_size: int  # V
    divided: bool  # whether the other columns are on other devices
    first: jax.Array | int  # token id of the first column

    def targets(self, targets_R):
        """Returns (index of each target among these columns, whether it is among them), both [R]."""
        place_R = targets_R - self.first
        count = self.head_DC.shape[1]
        return jnp.clip(place_R, 0, count - 1), (place_R >= 0) & (place_R < count)

    def of_targets(self, targets_R, dtype):
        """Takes the column of each target, [R, D]; zeros where another device has it."""
        if not self.divided:
            return jnp.take(self.head_DC, targets_R, axis=1).T.astype(dtype)
        place_R, is_here_R = self.targets(targets_R)
        return jnp.where(is_here_R[:, None], jnp.take(self.head_DC, place_R, axis=1).T.astype(dtype), 0)

    def masked(self, logits_RC, ids_C=None):
        """Sets the logits of padding to `MASKED_LOGIT`; a whole head has no padding."""
        if not self.divided:
            return logits_RC
        ids_C = self.first + jnp.arange(self.head_DC.shape[1]) if ids_C is None else ids_C
        return jnp.where(ids_C < self.vocab_size, logits_RC, MASKED_LOGIT)


def columns(head_DC, vocab_size: int = 0) -> Columns:
    """Makes the `Columns` of a head, which is one device's where it has fewer than `vocab_size`."""
    count = head_DC.shape[1]
    divided = count < vocab_size
    return Columns(head_DC, vocab_size or count, divided, jax.lax.axis_index(AXIS) * count if divided else 0)


def join_softmax(divided: bool, highest_R, total_R, target_R):
    """Combines the softmax statistics of all devices: returns (log-sum-exp, target's logit) of each row, [R] both.

    highest_R: largest logit among this device's columns.
    total_R: sum over its columns of exp(logit - highest).
    target_R: the target's logit; 0 where another device has it.

    Must not be differentiated.
    """
    if divided:
        over_all_R = jax.lax.pmax(highest_R, AXIS)
        total_R = jax.lax.psum(total_R * jnp.exp(highest_R - over_all_R), AXIS)
        highest_R, target_R = over_all_R, jax.lax.psum(target_R, AXIS)
    return highest_R + jnp.log(total_R), target_R


def token_nll(x_TD, head_DC, targets_T, vocab_size: int = 0):
    """Computes the negative log likelihood [T] of each target, in nats and float32, a block of tokens at a time.

    Differentiable any number of times. With a divided head, `x_TD` must be equal on all devices; so are its cotangents.
    """
    divided = columns(head_DC, vocab_size).divided
    x_TD, T = copy_to_all(x_TD, divided), x_TD.shape[0]
    block = _block_size(T, max(1, MAX_LOGITS // head_DC.shape[1]))
    if block == T:
        return _block_nll(x_TD, head_DC, targets_T, vocab_size)

    @jax.checkpoint
    def one_block(args):
        return _block_nll(args[0], head_DC, args[1], vocab_size)

    blocks = (x_TD.reshape(T // block, block, -1), targets_T.reshape(T // block, block))
    return jax.lax.map(one_block, blocks).reshape(T)


def token_scores(x_TD, head_DV, targets_T):
    """Computes the NLL [T] of each target as `token_nll` does, and whether it is the likeliest token [T].

    For inference, with a whole head; a block of tokens at a time.
    """

    def one_block(args):
        x_tD, targets_t = args
        logits_tV = logits(x_tD, head_DV)
        target_t = jnp.take_along_axis(logits_tV, targets_t[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits_tV, axis=-1) - target_t, logits_tV.argmax(axis=-1) == targets_t

    block = _block_size(len(x_TD), max(1, MAX_LOGITS // head_DV.shape[1]))
    scores = jax.lax.map(one_block, _blocks((x_TD, targets_T), block))
    return jax.tree.map(lambda a: a.reshape(-1), scores)


class Softmax(NamedTuple):
    """Residuals of `nll_forward` for `nll_reverse`."""

    lse_R: jax.Array  # log-sum-exp: log of the softmax's denominator
    logits_RC: jax.Array | None  # if all rows are one block; else they are computed again


def nll_forward(x_RD, head_DC, targets_R, vocab_size: int = 0):
    """Computes the NLL [R] of the targets in float32, and the residuals for `nll_reverse`."""
    head = columns(head_DC, vocab_size)

    def one_block(args):
        x_rD, targets_r = args
        logits_rC = head.masked(logits(x_rD, head_DC))
        highest_r = logits_rC.max(axis=-1)
        total_r = jnp.exp(logits_rC - highest_r[:, None]).sum(axis=-1)
        place_r, is_here_r = head.targets(targets_r)
        target_r = jnp.where(is_here_r, jnp.take_along_axis(logits_rC, place_r[:, None], axis=-1)[:, 0], 0)
        return (highest_r, total_r, target_r), logits_rC

    block = _rows_at_once(len(x_RD), head_DC.shape[1])
    if block == len(x_RD):
        statistics, logits_RC = one_block((x_RD, targets_R))
    else:
        statistics, logits_RC = jax.lax.map(lambda args: one_block(args)[0], _blocks((x_RD, targets_R), block)), None
        statistics = jax.tree.map(lambda a: a.reshape(-1), statistics)
    lse_R, target_R = join_softmax(head.divided, *statistics)
    return lse_R - target_R, Softmax(lse_R, logits_RC)


def nll_reverse(x_RD, head_DC, targets_R, softmax: Softmax, nll_bar_R, vocab_size: int = 0):
    """Computes the cotangents of the hidden states [R, D] and, in float32, of the head [D, C].

    With a divided head, the former are one term of a sum over the devices.
    """
    head, dtype = columns(head_DC, vocab_size), x_RD.dtype

    def one_block(head_bar_DC, args, logits_rC=None):
        x_rD, targets_r, lse_r, nll_bar_r = args
        if logits_rC is None:
            logits_rC = head.masked(logits(x_rD, head_DC))
        place_r, is_here_r = head.targets(targets_r)
        is_target_rC = is_here_r[:, None] & (jnp.arange(head_DC.shape[1]) == place_r[:, None])
        p_minus_y_rC = jnp.exp(logits_rC - lse_r[:, None]) - is_target_rC
        logits_bar_rC = (nll_bar_r[:, None] * p_minus_y_rC).astype(dtype)
        head_bar_DC += _product(x_rD.T, logits_bar_rC)
        return head_bar_DC, _product(logits_bar_rC, head_DC.T.astype(dtype)).astype(dtype)

    args = (x_RD, targets_R, softmax.lse_R, nll_bar_R)
    zeros_DC = jnp.zeros(head_DC.shape, at_least_float32(dtype))
    block = _rows_at_once(len(x_RD), head_DC.shape[1])
    if block == len(x_RD):
        head_bar_DC, x_bar_RD = one_block(zeros_DC, args, softmax.logits_RC)
    else:
        head_bar_DC, x_bar_nrD = jax.lax.scan(one_block, zeros_DC, _blocks(args, block))
        x_bar_RD = x_bar_nrD.reshape(x_RD.shape)
    return x_bar_RD, head_bar_DC


def logits(x_TD, head_DV):
    """Computes logits [T, V], in float32 whatever the dtype of the normed hidden states."""
    return _product(x_TD, head_DV.astype(x_TD.dtype))


def masked_mean(nll, is_target):
    """Averages `nll` over the last axis where `is_target`; without any target the mean is 0, with zero gradient."""
    total = jnp.sum(jnp.where(is_target, nll, 0), axis=-1)
    return total / jnp.maximum(jnp.sum(is_target, axis=-1), 1)


def _product(a, b):
    return jnp.matmul(a, b, preferred_element_type=at_least_float32(a.dtype))


def _block_size(T: int, limit: int) -> int:
    """Returns the largest divisor of T up to a limit."""
    return max(size for size in range(1, T + 1) if T % size == 0 and size <= limit)


def _rows_at_once(R: int, C: int) -> int:
    return _block_size(R, max(MIN_ROWS, MAX_LOGITS // C))


def _blocks(arrays, block: int):
    return jax.tree.map(lambda a: a.reshape(-1, block, *a.shape[1:]), arrays)


def _block_nll(x_TD, head_DC, targets_T, vocab_size: int):
    """Computes the NLL [T] with all logits [T, C] at once."""
    head = columns(head_DC, vocab_size)
    logits_TC = head.masked(logits(x_TD, head_DC))
    if not head.divided:
        target_logit_T = jnp.take_along_axis(logits_TC, targets_T[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits_TC, axis=-1) - target_logit_T
    highest_T = jax.lax.stop_gradient(jax.lax.pmax(jax.lax.stop_gradient(logits_TC.max(axis=-1)), AXIS))
    total_T = sum_to_all(jnp.exp(logits_TC - highest_T[:, None]).sum(axis=-1), True)
    place_T, is_here_T = head.targets(targets_T)
    target_T = jnp.where(is_here_T, jnp.take_along_axis(logits_TC, place_T[:, None], axis=-1)[:, 0], 0)
    return highest_T + jnp.log(total_T) - sum_to_all(target_T, True)
