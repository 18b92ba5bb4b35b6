"""The reverse of one mini-batch, block by block: what `inner.remat = "block"` does with the dual program.

JAX's reverse of a scan over blocks would return the gradients of all blocks stacked, for the caller to add to the sums
of earlier mini-batches: a second copy of all of them. Here each block adds its own in place, after its residuals have
been computed again from the hidden states (and their tangents) that entered it.

The reference is the reverse of `meta_gradient.reverse_program`.

Shapes: `B` sequences, `b` inner mini-batch, `D` model width, `L` suffix blocks, `K` cached positions, `G` key/value
heads, `H` head width.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.inner.step import MiniBatch
from ttt_e2e.model import KeyValues
from ttt_e2e.model.dual_loss import HeadPass, dual_nll
from ttt_e2e.model.parameters import merge, split
from ttt_e2e.model.passes import DualPass


class Sums(NamedTuple):
    """Cotangents: sums over the mini-batches from the last to this one, but those of the window caches."""

    fast: Any
    slow: Any
    cache_BLKGH: KeyValues


def pull_back(suffix_def, sums: Sums, slow, of_block, num_empty, mini_batch: MiniBatch, head: HeadPass, seeds):
    """Adds one mini-batch's cotangents to those of the mini-batches after it.

    Args:
      suffix_def: static structure of the `Suffix`.
      sums: cotangents so far; those of the window caches are of what the mini-batch leaves.
      slow: slow weights.
      of_block: (index of a block, sum of its fast weights' cotangents over the mini-batches after this one) -> (W_i, u,
        window cache [B, K, G, H]) of that block. Made anew where they are needed, so that no copy of a whole stack is.
      num_empty: how many leading positions of the caches are empty.
      mini_batch: arrays with a leading axis B.
      head: the head's forward pass.
      seeds: cotangents [B, b] of the NLL and of its tangent along u.

    Returns:
      The sums, those of the window caches now of what the mini-batch sees, and the cotangent [B, b, D] of the hidden
      states.
    """
    suffix = merge(suffix_def, sums.fast, slow)  # for its structure and what is not a block
    block_def, *_ = split(suffix.blocks)
    windows = suffix.config.windows
    periods = jnp.arange(suffix.config.num_fast_blocks).reshape(-1, len(windows))
    top = {name: weights for name, weights in slow.items() if name != "blocks"}
    x_BbD = mini_batch.x_bD

    def dual_block(window, block, sums):
        fast, u, cache = of_block(block, {"blocks": _take(sums.fast, block, axis=1)})
        run = partial(_dual_block, block_def, window, num_empty, u["blocks"])
        return run, (fast["blocks"], _take(slow["blocks"], block, axis=0), cache)

    def dual_top(top, x_BbD, x_dot_BbD):
        norm = jax.vmap(merge(suffix_def, sums.fast, slow | top).final_norm)
        hidden_BbD, hidden_dot_BbD = jax.jvp(norm, (x_BbD,), (x_dot_BbD,))
        dual = jax.vmap(dual_nll, in_axes=(0, 0, None, 0, 0))
        return dual(hidden_BbD, hidden_dot_BbD, top["head"], mini_batch.targets_b, head)

    def forward_period(hidden, blocks):
        entered = []
        for block, window in zip(blocks, windows, strict=True):
            entered.append(hidden)
            run, weights = dual_block(window, block, in_blocks)
            hidden, _ = run(*weights, *hidden)
        return hidden, entered

    def reverse_period(carry, step):
        for block, hidden, window in reversed(list(zip(*step, windows, strict=True))):
            hidden_bar, sums = carry
            run, weights = dual_block(window, block, sums)
            _, pull = jax.vjp(run, *weights, *hidden)
            fast_bar, slow_bar, cache_bar, *hidden_bar = pull((hidden_bar, _take(sums.cache_BLKGH, block, axis=1)))
            fast = _add(sums.fast, fast_bar, block, axis=1)
            slow = _add(sums.slow, slow_bar, block, axis=0)
            carry = tuple(hidden_bar), Sums(fast, slow, _put(sums.cache_BLKGH, cache_bar, block, axis=1))
        return carry, None

    in_blocks = sums._replace(fast=sums.fast["blocks"], slow=sums.slow["blocks"])
    hidden, entered = jax.lax.scan(forward_period, (x_BbD, jnp.zeros_like(x_BbD)), periods)
    _, pull = jax.vjp(dual_top, top, *hidden)
    top_bar, *hidden_bar = pull(seeds)
    carry, _ = jax.lax.scan(reverse_period, (tuple(hidden_bar), in_blocks), (periods, entered), reverse=True)
    (x_bar_BbD, _), in_blocks = carry
    top_sum = jax.tree.map(jnp.add, {name: sums.slow[name] for name in top}, top_bar)
    return Sums({"blocks": in_blocks.fast}, {"blocks": in_blocks.slow} | top_sum, in_blocks.cache_BLKGH), x_bar_BbD


def _dual_block(block_def, window: int, num_empty, u, fast, slow, cache: KeyValues, x_BbD, x_dot_BbD):
    """((hidden states, their tangents) after a block, its window cache after the mini-batch)."""

    def run(fast, x_bD, cache):
        x_bD, new = merge(block_def, fast, slow)(x_bD, DualPass(), window=window, cache=cache, num_empty=num_empty)
        return x_bD, cache.append(new)

    def run_all(fast, x_BbD):
        return jax.vmap(run)(fast, x_BbD, cache)

    (x_BbD, cache), (x_dot_BbD, _) = jax.jvp(run_all, (fast, x_BbD), (u, x_dot_BbD))
    return (x_BbD, x_dot_BbD), cache


def _take(stacked, i, axis: int):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, axis, keepdims=False), stacked)


def _put(stacked, new, i, axis: int):
    return jax.tree.map(lambda a, n: jax.lax.dynamic_update_index_in_dim(a, n, i, axis), stacked, new)


def _add(sums, new, i, axis: int):
    return _put(sums, jax.tree.map(jnp.add, _take(sums, i, axis), new), i, axis)
