"""The inner loop with its own reverse: a custom VJP over the whole scan, derived in docs/meta_gradient.md.

The reverse of mini-batch i, given the cotangent W_bar of W_{i+1}, takes one reverse pass over the dual program

    (W, cache, slow, x) -> (loss, nll, cache', d/de loss(W + e u)),    u = -eta s (W_bar - D <D, W_bar> / |D|^2),

where D = W_i - W_{i+1} and s is the clip scale; the projection stands only where the gradient was clipped. That pass
holds one mini-batch's residuals at a time and differentiates nothing twice in reverse.

All sequences of a batch go through together, so that the gradients of the slow weights are summed over them at once.

Shapes: `B` sequences, `M` mini-batches of a sequence, `b` inner mini-batch, `D` model width, `L` suffix blocks,
`K` cached positions, `S` = K + M b positions of the key/value stream, `G` key/value heads, `H` head width.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.config import InnerConfig
from ttt_e2e.inner import by_block, trajectory
from ttt_e2e.inner.division import Weights
from ttt_e2e.inner.step import MiniBatch, clip_scale, inner_product, is_cut, sgd_update, target_weights
from ttt_e2e.model import KeyValues
from ttt_e2e.model.dual_loss import HeadPass, dual_nll, head_pass
from ttt_e2e.model.loss import token_nll
from ttt_e2e.model.parameters import Directed, at_least_float32, merge
from ttt_e2e.model.passes import DualPass, Pass, Recording

# Suffix blocks: slicing so few out of stacked arrays, for each mini-batch anew, costs more than a longer program. And
# where the first block has a program of its own, that spends nothing on tangents before its fast MLP: there are none.
MAX_UNROLLED = 2


class Residuals(NamedTuple):
    """What the forward scan leaves for the reverse one."""

    slow: Any  # what this device computes with
    stored_dtypes: Any  # of what it stores of that: scalars
    mini_batches_M: MiniBatch
    learning_rate: jax.Array
    stream_BLSGH: KeyValues  # K empty positions, then all keys and values; window caches are slices of it
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
    """What `adapt` returns, and the `Residuals` that its reverse needs."""
    stored_dtypes, slow = jax.tree.map(lambda w: jnp.zeros((), w.dtype), slow), weights.whole(slow)
    B, M, b, _ = mini_batches.x_bD.shape
    suffix = merge(suffix_def, fast, slow)
    K, divided = suffix.cache_size(M * b), suffix.divides_fast

    def inner_step(carry, step):
        fast, cache = carry
        mini_batch, i = step
        seen = cache, jnp.maximum(K - i * b, 0)
        gradient, head, new, kept = inner_gradient(suffix_def, inner, fast, slow, seen, mini_batch)
        scale_B = jax.vmap(partial(clip_scale, clip_norm=inner.clip_norm, divided=divided))(gradient)
        next_fast, saved = jax.vmap(partial(trajectory.take_step, inner))(fast, gradient, learning_rate * scale_B)
        return (next_fast, cache.append(new)), ((head.nll_T, scale_B, new), (saved, (head, kept)))

    empty = jax.tree.map(lambda a: jnp.broadcast_to(a, (B, *a.shape)), suffix.empty_cache(K))
    mini_batches_M = jax.tree.map(lambda a: a.swapaxes(0, 1), mini_batches)
    steps = (mini_batches_M, jnp.arange(M))
    (final, _), ((nll_MBb, scale_MB, new_M), saved) = trajectory.scan(inner, inner_step, (fast, empty), steps)
    # Not carried through the scan: XLA would copy the whole stream for every mini-batch that writes to it.
    new = jax.tree.map(lambda n: jnp.moveaxis(n, 0, 2).reshape(*n.shape[1:3], M * b, *n.shape[4:]), new_M)
    stream = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), empty, new)
    nll_BMb = nll_MBb.swapaxes(0, 1)
    loss_BM = jnp.sum(target_weights(mini_batches.is_target_b, nll_BMb.dtype) * nll_BMb, axis=-1)
    residuals = Residuals(slow, stored_dtypes, mini_batches_M, learning_rate, stream, scale_MB, saved)
    return (loss_BM, nll_BMb, final), residuals


def _reverse(suffix_def, inner: InnerConfig, weights: Weights, residuals: Residuals, cotangents):
    loss_bar_BM, nll_bar_BMb, final_bar = cotangents
    slow, stored_dtypes, mini_batches_M, learning_rate, stream, scale_MB, saved = residuals
    M, _, b, _ = mini_batches_M.x_bD.shape
    divided = merge(suffix_def, final_bar, slow).divides_fast
    K = stream.k.shape[2] - M * b

    def replay_step(fast, step):
        mini_batch, i, scale_B, *_ = step
        seen = window_cache(stream, i, b, K)
        gradient, head, _, kept = inner_gradient(suffix_def, inner, fast, slow, seen, mini_batch)
        return jax.vmap(sgd_update)(fast, gradient, learning_rate * scale_B), (head, kept)

    def reverse_step(carry, taken, known, step):
        fast_bar, slow_bar, cache_bar = carry
        mini_batch, i, scale_B, loss_bar_B, nll_bar_Bb = step
        weight_Bb = target_weights(mini_batch.is_target_b, nll_bar_Bb.dtype)
        seeds = nll_bar_Bb + loss_bar_B[:, None] * weight_Bb, weight_Bb
        fast, update = taken.weights()
        rate_B = learning_rate * scale_B
        parallel_B = jax.vmap(partial(_parallel_part, divided))(fast_bar, update, scale_B < 1)
        if inner.remat == "block" and inner.gradient != "first_order":

            def of_block(block, fast_bar):
                fast, update = taken.weights(block)
                cache = jax.tree.map(lambda s: _block_of_cache(s, block, i * b, K), stream)
                return fast, jax.vmap(_update_cotangent)(fast_bar, update, rate_B, parallel_B), cache

            sums, num_empty, head = by_block.Sums(*carry), jnp.maximum(K - i * b, 0), known[0]
            sums, x_bar_BbD = by_block.pull_back(suffix_def, sums, slow, of_block, num_empty, mini_batch, head, seeds)
            fast_bar, slow_bar, cache_bar = sums
        else:
            cache, num_empty = window_cache(stream, i, b, K)
            direction = jax.vmap(_update_cotangent)(fast_bar, update, rate_B, parallel_B)
            program = reverse_program(suffix_def, inner, direction, mini_batch, num_empty, *known)
            seeds = (seeds[0], cache_bar, *(() if inner.gradient == "first_order" else seeds[1:]))
            _, pull_back = jax.vjp(program, fast, cache, slow, mini_batch.x_bD)
            fast_bar_i, cache_bar, slow_bar_i, x_bar_BbD = pull_back(seeds)
            fast_bar, slow_bar = jax.tree.map(jnp.add, (fast_bar, slow_bar), (fast_bar_i, slow_bar_i))
        if inner.truncate:
            fast_bar = jax.tree.map(lambda w: jnp.where(is_cut(inner, i), 0, w), fast_bar)
        return (fast_bar, slow_bar, cache_bar), x_bar_BbD

    steps = (mini_batches_M, jnp.arange(M), scale_MB, loss_bar_BM.T, nll_bar_BMb.swapaxes(0, 1))
    slow_bar = jax.tree.map(lambda w: jnp.zeros(w.shape, at_least_float32(w.dtype)), slow)
    carry = (final_bar, slow_bar, jax.tree.map(jnp.zeros_like, window_cache(stream, 0, b, K)[0]))
    (fast_bar, slow_bar, _), x_bar_M = trajectory.reverse_scan(inner, reverse_step, replay_step, carry, saved, steps)
    slow_bar = weights.reduced(jax.tree.map(lambda bar, like: bar.astype(like.dtype), slow_bar, stored_dtypes))
    return fast_bar, slow_bar, MiniBatch(x_bar_M.swapaxes(0, 1), None, None), None


adapt.defvjp(forward_scan, _reverse)


def reverse_program(suffix_def, inner: InnerConfig, direction, mini_batch: MiniBatch, num_empty, head: HeadPass, kept):
    """What the reverse of a mini-batch differentiates: a function of (fast, cache, slow, x)."""
    run = partial(_run_suffix, suffix_def, known=kept, num_empty=num_empty, remat=inner.remat == "block")
    if inner.gradient == "first_order":
        return partial(_first_order_program, suffix_def, run, mini_batch.targets_b)
    return partial(_dual_program, suffix_def, run, direction, mini_batch.targets_b, head)


def _run_suffix(suffix_def, fast, slow, cache: KeyValues, x_BbD, *, num_empty, make_pass=Pass, known=(), remat: bool):
    """The suffix over a mini-batch of every sequence: normed hidden states [B, b, D], in a `DualPass` [B, 2, b, D], new
    keys and values, and what the pass kept."""

    def run(fast, cache, x_bD, known):
        suffix = merge(suffix_def, fast, slow)
        unroll = suffix.config.num_fast_blocks <= MAX_UNROLLED and not remat
        return suffix(x_bD, cache, num_empty, make_pass=make_pass, known=known, remat=remat, unroll=unroll)

    return jax.vmap(run)(fast, cache, x_BbD, known)


def inner_gradient(suffix_def, inner: InnerConfig, fast, slow, seen, mini_batch: MiniBatch):
    """Gradient of each sequence's loss_i at its fast weights, the head's forward pass, new keys and values, and what
    the reverse of the mini-batch is to know already; `seen` is what `window_cache` says."""
    cache, num_empty = seen
    make_pass, remat = (Recording if inner.remat == "keep" else Pass), inner.remat == "block"

    def run(fast):
        hidden_BbD, new, kept = _run_suffix(
            suffix_def, fast, slow, cache, mini_batch.x_bD, num_empty=num_empty, make_pass=make_pass, remat=remat
        )
        return hidden_BbD, (new, kept)

    hidden_BbD, pull_back, (new, kept) = jax.vjp(run, fast, has_aux=True)
    vocab_size = merge(suffix_def, fast, slow).config.vocab_size
    head = head_pass(hidden_BbD, slow["head"], mini_batch.targets_b, vocab_size)
    weight_Bb = target_weights(mini_batch.is_target_b, head.nll_T.dtype)
    (gradient,) = pull_back((weight_Bb[..., None] * head.gradient_TD).astype(hidden_BbD.dtype))
    return gradient, head, new, kept


def _dual_program(suffix_def, run, direction, targets_Bb, head: HeadPass, fast, cache: KeyValues, slow, x_BbD):
    """(NLL, window cache after the mini-batch, derivative of the NLL along `direction` of the fast weights)."""

    directed = jax.tree.map(Directed, fast, direction)
    hidden_B2bD, new, _ = run(directed, slow, cache, x_BbD, make_pass=DualPass)
    vocab_size = merge(suffix_def, fast, slow).config.vocab_size
    nll_Bb, nll_dot_Bb = dual_nll(hidden_B2bD[:, 0], hidden_B2bD[:, 1], slow["head"], targets_Bb, head, vocab_size)
    return nll_Bb, cache.append(new), nll_dot_Bb


def _first_order_program(suffix_def, run, targets_Bb, fast, cache: KeyValues, slow, x_BbD):
    """(NLL, window cache after the mini-batch): what is left where updates are constants."""
    hidden_BbD, new, _ = run(fast, slow, cache, x_BbD)
    nll = partial(token_nll, vocab_size=merge(suffix_def, fast, slow).config.vocab_size)
    return jax.vmap(nll, in_axes=(0, None, 0))(hidden_BbD, slow["head"], targets_Bb), cache.append(new)


def window_cache(stream_BLSGH: KeyValues, i, b: int, K: int):
    """The window caches [B, L, K, G, H] that mini-batch i sees, and how many of their leading positions are empty."""
    cache = jax.tree.map(lambda s: jax.lax.dynamic_slice_in_dim(s, i * b, K, axis=2), stream_BLSGH)
    return cache, jnp.maximum(K - i * b, 0)


def _block_of_cache(stream_BLSGH, block, start, K: int):
    """[B, K, G, H]: `window_cache` of one block, in one slice."""
    B, _, _, G, H = stream_BLSGH.shape
    return jax.lax.dynamic_slice(stream_BLSGH, (0, block, start, 0, 0), (B, 1, K, G, H))[:, 0]


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
