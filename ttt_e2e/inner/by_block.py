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
from ttt_e2e.model.parameters import Directed, merge, split
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

    def dual_block(window, block, sums):
        fast, u, cache = of_block(block, {"blocks": _take(sums.fast, block, axis=1)})
        run = partial(_dual_block, block_def, window, num_empty, u["blocks"])
        return run, (fast["blocks"], _take(slow["blocks"], block, axis=0), cache)

    def dual_top(top, x_B2bD):
        norm = partial(DualPass().lift, merge(suffix_def, sums.fast, slow | top).final_norm)
        hidden_B2bD = jax.vmap(norm)(x_B2bD)
        vocab_size = suffix.config.vocab_size
        targets_Bb = mini_batch.targets_b
        return dual_nll(hidden_B2bD[:, 0], hidden_B2bD[:, 1], top["head"], targets_Bb, head, vocab_size)

    def forward_period(x_B2bD, blocks):
        entered = []
        for block, window in zip(blocks, windows, strict=True):
            entered.append(x_B2bD)
            run, weights = dual_block(window, block, in_blocks)
            x_B2bD, _ = run(*weights, x_B2bD)
        return x_B2bD, entered

    def reverse_period(carry, step):
        for block, x_B2bD, window in reversed(list(zip(*step, windows, strict=True))):
            x_bar_B2bD, sums = carry
            run, weights = dual_block(window, block, sums)
            _, pull = jax.vjp(run, *weights, x_B2bD)
            fast_bar, slow_bar, cache_bar, x_bar_B2bD = pull((x_bar_B2bD, _take(sums.cache_BLKGH, block, axis=1)))
            fast = _add(sums.fast, fast_bar, block, axis=1)
            slow = _add(sums.slow, slow_bar, block, axis=0)
            carry = x_bar_B2bD, Sums(fast, slow, _put(sums.cache_BLKGH, cache_bar, block, axis=1))
        return carry, None

    in_blocks = sums._replace(fast=sums.fast["blocks"], slow=sums.slow["blocks"])
    x_B2bD = jax.vmap(partial(DualPass().begin, in_scan=True))(mini_batch.x_bD)
    x_B2bD, entered = jax.lax.scan(forward_period, x_B2bD, periods)
    _, pull = jax.vjp(dual_top, top, x_B2bD)
    top_bar, x_bar_B2bD = pull(seeds)
    carry, _ = jax.lax.scan(reverse_period, (x_bar_B2bD, in_blocks), (periods, entered), reverse=True)
    x_bar_B2bD, in_blocks = carry
    top_sum = jax.tree.map(jnp.add, {name: sums.slow[name] for name in top}, top_bar)
    sums = Sums({"blocks": in_blocks.fast}, {"blocks": in_blocks.slow} | top_sum, in_blocks.cache_BLKGH)
    return sums, x_bar_B2bD[:, 0]


def _dual_block(block_def, window: int, num_empty, u, fast, slow, cache: KeyValues, x_B2bD):
    """(Hidden states and their tangents after a block, its window cache after the mini-batch)."""

    def run(directed, x_2bD, cache):
        block = merge(block_def, directed, slow)
        x_2bD, new = block(x_2bD, DualPass(), window=window, cache=cache, num_empty=num_empty)
        return x_2bD, cache.append(new)

    return jax.vmap(run)(jax.tree.map(Directed, fast, u), x_B2bD, cache)


def _take(stacked, i, axis: int):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, axis, keepdims=False), stacked)


def _put(stacked, new, i, axis: int):
    return jax.tree.map(lambda a, n: jax.lax.dynamic_update_index_in_dim(a, n, i, axis), stacked, new)


def _add(sums, new, i, axis: int):
    return _put(sums, jax.tree.map(jnp.add, _take(sums, i, axis), new), i, axis)
