"""The inner loop with its own reverse: a custom VJP over the whole scan, derived in docs/meta_gradient.md.

The reverse of mini-batch i, given the cotangent W_bar of W_{i+1}, takes one reverse pass over the dual program

    (W, states, slow, x) -> (nll, states', d/de loss(W + e u)),    u = -eta s (W_bar - D <D, W_bar> / |D|^2),

where D = W_i - W_{i+1} and s is the clip scale; the projection stands only where the gradient was clipped. That pass
holds one mini-batch's residuals at a time and differentiates nothing twice in reverse.

All sequences of a batch go through together, so that the gradients of the slow weights are summed over them at once.

What the mixers carry from mini-batch to mini-batch (their States: KV caches, or recurrent states) is kept as Logs, of
which each mini-batch's States are slices. The reverse scan carries the cotangents of the States between two
mini-batches (model/mixers/base.py).

Shapes: `B` sequences, `M` mini-batches of a sequence, `b` inner mini-batch, `D` model width, `L` blocks of a stack.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.config import InnerConfig
from ttt_e2e.inner import by_block, trajectory
from ttt_e2e.inner.division import Weights
from ttt_e2e.inner.step import MiniBatch, clip_scale, inner_gradient, inner_product, is_cut, sgd_update, target_weights
from ttt_e2e.model.dual_loss import HeadPass, dual_nll
from ttt_e2e.model.loss import token_nll
from ttt_e2e.model.mixers import Context
from ttt_e2e.model.parameters import Directed, Structure, at_least_float32, structure_of
from ttt_e2e.model.passes import DualPass, Pass, Recording

# Suffix blocks: slicing so few out of stacked arrays, for each mini-batch anew, costs more than a longer program. And
# where the first block has a program of its own, that spends nothing on tangents before its fast MLP: there are none.
MAX_UNROLLED = 2


class Residuals(NamedTuple):
    """Residuals of the forward scan, for the reverse one."""

    slow: Any  # what this device computes with
    stored_dtypes: Any  # of what it stores of that: scalars
    mini_batches_M: MiniBatch
    learning_rate: jax.Array
    log: Any  # {stack: Log [B, L, ...]} of its mixers
    scale_MB: jax.Array  # clip scales
    trajectory: Any  # what rebuilds W_i, and what else is known of each mini-batch


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def adapt(suffix_def, inner: InnerConfig, weights: Weights, fast, slow, mini_batches: MiniBatch, learning_rate):
    """Reads the sequences of a batch, mini-batch by mini-batch.

    Args:
      suffix_def: static structure of the `Suffix`.
      inner: the inner loop's configuration.
      weights: how the slow weights are stored. They are put together once, and their cotangents, sums in float32 over
        all mini-batches, added up over the devices once.
      fast: initial fast weights, with a leading axis over the B sequences.
      slow: slow weights, as they are stored.
      mini_batches: arrays with leading axes [B, M].
      learning_rate: eta; a constant to the meta-gradient.

    Returns:
      Losses [B, M], NLL [B, M, b] and final fast weights. Differentiable in `fast`, `slow` and the hidden states.
    """
    return forward_scan(suffix_def, inner, weights, fast, slow, mini_batches, learning_rate)[0]


def forward_scan(suffix_def, inner: InnerConfig, weights: Weights, fast, slow, mini_batches: MiniBatch, learning_rate):
    """Forward pass of `adapt`: its results, and the `Residuals` of its reverse."""
    stored_dtypes, slow = jax.tree.map(lambda w: jnp.zeros((), w.dtype), slow), weights.whole(slow)
    B, M, b, _ = mini_batches.hidden.shape
    suffix = structure_of(suffix_def, fast, slow)

    def inner_step(carry, step):
        fast, states = carry
        mini_batch, i = step
        gradient, head, entries, recorded = gradient_of_suffix(
            suffix, inner, fast, slow, states, Context(start=i * b), mini_batch
        )
        clip = partial(clip_scale, clip_norm=inner.clip_norm, divided=suffix.module.divides_fast)
        scale_B = jax.vmap(clip)(gradient)
        next_fast, saved = jax.vmap(partial(trajectory.take_step, inner))(fast, gradient, learning_rate * scale_B)
        next_states = jax.vmap(suffix.module.advance)(states, entries)
        return (next_fast, next_states), ((head.nll_T, scale_B, entries), (saved, (head, recorded)))

    first = jax.tree.map(lambda a: jnp.broadcast_to(a, (B, *a.shape)), suffix.module.empty(M * b))
    mini_batches_M = jax.tree.map(lambda a: a.swapaxes(0, 1), mini_batches)
    steps = (mini_batches_M, jnp.arange(M))
    (final, _), ((nll_MBb, scale_MB, entries_M), saved) = trajectory.scan(inner, inner_step, (fast, first), steps)
    # Not carried through the scan: XLA would copy the whole Log for every mini-batch that writes to it.
    log = jax.vmap(suffix.module.log, in_axes=(0, 1))(first, entries_M)
    nll_BMb = nll_MBb.swapaxes(0, 1)
    loss_BM = jnp.sum(target_weights(mini_batches.is_target, nll_BMb.dtype) * nll_BMb, axis=-1)
    residuals = Residuals(slow, stored_dtypes, mini_batches_M, learning_rate, log, scale_MB, saved)
    return (loss_BM, nll_BMb, final), residuals


def _reverse(suffix_def, inner: InnerConfig, weights: Weights, residuals: Residuals, cotangents):
    loss_bar_BM, nll_bar_BMb, final_bar = cotangents
    slow, stored_dtypes, mini_batches_M, learning_rate, log, scale_MB, saved = residuals
    M, _, b, _ = mini_batches_M.hidden.shape
    suffix = structure_of(suffix_def, final_bar, slow)

    def replay_step(fast, step):
        mini_batch, i, scale_B, *_ = step
        states, context = suffix.module.at(log, i), Context(start=i * b)
        gradient, head, _, recorded = gradient_of_suffix(suffix, inner, fast, slow, states, context, mini_batch)
        return jax.vmap(sgd_update)(fast, gradient, learning_rate * scale_B), (head, recorded)

    def reverse_step(carry, inner_step: trajectory.Step | trajectory.RoundedStep, forward, step):
        fast_bar, slow_bar, states_bar = carry
        mini_batch, i, scale_B, loss_bar_B, nll_bar_Bb = step
        weight_Bb = target_weights(mini_batch.is_target, nll_bar_Bb.dtype)
        seeds = nll_bar_Bb + loss_bar_B[:, None] * weight_Bb, weight_Bb
        fast, update = inner_step.weights()
        rate_B, context = learning_rate * scale_B, Context(start=i * b)
        parallel_B = jax.vmap(partial(_parallel_part, suffix.module.divides_fast))(fast_bar, update, scale_B < 1)
        if inner.remat == "block" and inner.gradient != "first_order":

            def of_block(stack, block, fast_bar):
                fast, update = inner_step.weights(stack, block)
                state = suffix.module.at({stack: log[stack]}, i, partial(_take_of_block, block))[stack]
                return fast, jax.vmap(_update_cotangent)(fast_bar, update, rate_B, parallel_B), state

            sums = by_block.Cotangents(*carry)
            sums, x_bar_BbD = by_block.pull_back(suffix, sums, slow, of_block, context, mini_batch, forward[0], seeds)
            fast_bar, slow_bar, states_bar = sums
        else:
            direction = jax.vmap(_update_cotangent)(fast_bar, update, rate_B, parallel_B)
            program = reverse_program(suffix, inner, direction, mini_batch, context, *forward)
            seeds = (seeds[0], states_bar, *(() if inner.gradient == "first_order" else seeds[1:]))
            _, pull_back = jax.vjp(program, fast, suffix.module.at(log, i), slow, mini_batch.hidden)
            fast_bar_i, states_bar, slow_bar_i, x_bar_BbD = pull_back(seeds)
            fast_bar, slow_bar = jax.tree.map(jnp.add, (fast_bar, slow_bar), (fast_bar_i, slow_bar_i))
        if inner.truncate:
            fast_bar = jax.tree.map(lambda w: jnp.where(is_cut(inner, i), 0, w), fast_bar)
        return (fast_bar, slow_bar, states_bar), x_bar_BbD

    steps = (mini_batches_M, jnp.arange(M), scale_MB, loss_bar_BM.T, nll_bar_BMb.swapaxes(0, 1))
    slow_bar = jax.tree.map(lambda w: jnp.zeros(w.shape, at_least_float32(w.dtype)), slow)
    carry = (final_bar, slow_bar, jax.tree.map(jnp.zeros_like, suffix.module.at(log, 0)))
    (fast_bar, slow_bar, _), x_bar_M = trajectory.reverse_scan(inner, reverse_step, replay_step, carry, saved, steps)
    slow_bar = weights.reduced(jax.tree.map(lambda bar, like: bar.astype(like.dtype), slow_bar, stored_dtypes))
    return fast_bar, slow_bar, MiniBatch(x_bar_M.swapaxes(0, 1), None, None), None


adapt.defvjp(forward_scan, _reverse)


def reverse_program(
    suffix: Structure, inner: InnerConfig, direction, mini_batch: MiniBatch, context: Context, head: HeadPass, recorded
):
    """The function of (fast, states, slow, x) that the reverse of a mini-batch differentiates."""
    run = partial(_run_suffix, suffix, context=context, recorded=recorded, remat=inner.remat == "block")
    if inner.gradient == "first_order":
        return partial(_first_order_program, suffix, run, mini_batch.targets)
    return partial(_dual_program, suffix, run, direction, mini_batch.targets, head)


def _run_suffix(  # noqa: PLR0913 -- operands of the derivative first, then what kind of pass it is
    suffix: Structure, fast, slow, states: dict, x_BbD, *, context: Context, make_pass=Pass, recorded=None, remat: bool
):
    """The suffix over a mini-batch of every sequence: normed hidden states [B, b, D], in a `DualPass` [B, 2, b, D], the
    mixers' Entries, and what the pass recorded."""

    def run(fast, states, x_bD, recorded):
        unroll = suffix.module.config.num_fast_blocks <= MAX_UNROLLED and not remat
        options = {"make_pass": make_pass, "recorded": recorded, "remat": remat, "unroll": unroll}
        return suffix.bind(fast, slow).extend(x_bD, states, context, **options)

    return jax.vmap(run)(fast, states, x_BbD, recorded)


def gradient_of_suffix(
    suffix: Structure, inner: InnerConfig, fast, slow, states: dict, context: Context, mini_batch: MiniBatch
):
    """Gradient of each sequence's loss_i at its fast weights; the head's forward pass; the mixers' Entries; and the
    results that the reverse of the mini-batch need not compute again."""
    make_pass, remat = (Recording if inner.remat == "keep" else Pass), inner.remat == "block"

    def run(fast):
        hidden_BbD, *others = _run_suffix(
            suffix, fast, slow, states, mini_batch.hidden, context=context, make_pass=make_pass, remat=remat
        )
        return hidden_BbD, others

    vocab_size = suffix.module.config.vocab_size
    gradient, head, (entries, recorded) = inner_gradient(run, fast, slow["head"], mini_batch, vocab_size)
    return gradient, head, entries, recorded


def _dual_program(  # noqa: PLR0913 -- the last four are the operands of the derivative
    suffix: Structure, run, direction, targets_Bb, head: HeadPass, fast, states: dict, slow, x_BbD
):
    """(NLL, States after the mini-batch, derivative of the NLL along `direction` of the fast weights)."""
    directed = jax.tree.map(Directed, fast, direction)
    hidden_B2bD, entries, _ = run(directed, slow, states, x_BbD, make_pass=DualPass)
    nll_Bb, nll_dot_Bb = dual_nll(
        hidden_B2bD[:, 0], hidden_B2bD[:, 1], slow["head"], targets_Bb, head, suffix.module.config.vocab_size
    )
    return nll_Bb, jax.vmap(suffix.module.advance)(states, entries), nll_dot_Bb


def _first_order_program(suffix: Structure, run, targets_Bb, fast, states: dict, slow, x_BbD):
    """(NLL, States after the mini-batch): what is left where updates are constants."""
    hidden_BbD, entries, _ = run(fast, slow, states, x_BbD)
    nll = partial(token_nll, vocab_size=suffix.module.config.vocab_size)
    nll_Bb = jax.vmap(nll, in_axes=(0, None, 0))(hidden_BbD, slow["head"], targets_Bb)
    return nll_Bb, jax.vmap(suffix.module.advance)(states, entries)


def _take_of_block(block, array, start, size: int, axis: int):
    """Slices one block of a stack [B, L, ...] along an axis (counted from the end), in one operation.

    Two slices, one after the other, would make XLA copy the block's whole entry.
    """
    starts, sizes = [0] * array.ndim, list(array.shape)
    starts[1], sizes[1], starts[axis], sizes[axis] = block, 1, start, size
    return jnp.squeeze(jax.lax.dynamic_slice(array, starts, sizes), 1)


def _update_cotangent(fast_bar, update, rate, parallel):
    """u: the cotangent of g in W_{i+1} = W_i - eta s(g) g, given that of W_{i+1}; `rate` is eta s."""
    return jax.tree.map(lambda w_bar, d: -(rate * (w_bar - parallel * d)).astype(w_bar.dtype), fast_bar, update)


def _parallel_part(divided: bool, fast_bar, update, is_clipped):
    """<D, W_bar> / |D|^2, or 0: how much of D = W_i - W_{i+1} to take out of the cotangent of W_{i+1}.

    D is parallel to g: where the gradient was clipped, s(g) g has a constant norm, and what is parallel to g drops out.
    Nothing is divided by eta, which may be 0.
    """
    squared_norm = inner_product(update, update, divided)
    is_clipped &= squared_norm > 0
    return jnp.where(is_clipped, inner_product(update, fast_bar, divided) / jnp.where(is_clipped, squared_norm, 1), 0)
