"""The reverse pass over the dual program of one mini-batch, block by block (`inner.remat = "block"`).

JAX's reverse of a scan over blocks would return the gradients of all blocks, stacked, for the caller to add to the sums
over mini-batches: a second array of the size of all gradients. Here each block adds its gradients to the sums in place.
Each block is rematerialised from its inputs: hidden states, and their tangents.

It computes the same as the reverse of `meta_gradient.reverse_program`, against which it is tested.

Shapes: `B` sequences, `b` inner mini-batch, `D` model width, `L` blocks of a stack.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.inner.step import MiniBatch
from ttt_e2e.model.dual_loss import HeadPass, dual_nll
from ttt_e2e.model.mixers import Context
from ttt_e2e.model.parameters import Directed, Structure, merge, split
from ttt_e2e.model.passes import DualPass
from ttt_e2e.model.stacks import by_segment, num_blocks


class Cotangents(NamedTuple):
    """Carry of the reverse scan: sums over the mini-batches after this one, but for `states`, which is no sum."""

    fast: Any  # W_bar, with leading axes [B, L]
    slow: Any  # {stack: [L, ...]}, and final norm and head
    states: Any  # {stack: [B, L, ...]}, cotangents of the States between this mini-batch and the next


def pull_back(  # long: the forward and the reverse scan over the blocks, which share what stands around them
    suffix: Structure, sums: Cotangents, slow, of_block, context: Context, mini_batch: MiniBatch, head: HeadPass, seeds
):
    """Runs the reverse of one mini-batch, and adds its cotangents to those of the mini-batches after it.

    Args:
      suffix: structure of the `Suffix`.
      sums: cotangents so far; `sums.states` are those of the States after this mini-batch.
      slow: slow weights.
      of_block: (stack, index of a block in it, the block's part of `sums.fast`) -> (W_i, u, State before the
        mini-batch) of that block. Called where they are needed, so that they exist for one block at a time.
      context: position of the mini-batch in the sequence.
      mini_batch: arrays with a leading axis B.
      head: the head's forward pass.
      seeds: cotangents [B, b] of the NLL and of its tangent along u.

    Returns:
      The new cotangents, whose `states` are those of the States before this mini-batch; and the cotangent [B, b, D] of
      the mini-batch's hidden states.
    """
    stacks, config = suffix.module.stacks, suffix.module.config
    block_defs = {name: split(stack)[0] for name, stack in stacks.items()}
    top = {name: weights for name, weights in slow.items() if name not in stacks}  # final norm and head

    def dual_block(name, i, sums):
        """Returns a function that runs block i of a stack, and its operands but the hidden states."""
        fast, u, state = of_block(name, i, _take(sums.fast[name], i, axis=1))
        run = partial(_dual_block, block_defs[name], context, u)
        return run, (fast, _take(slow[name], i, axis=0), state)

    def dual_top(top, x_B2bD):
        norm = partial(DualPass().apply, suffix.bind(suffix.fast, slow | top).final_norm)
        hidden_B2bD = jax.vmap(norm)(x_B2bD)
        values_BbD, tangents_BbD = hidden_B2bD[:, 0], hidden_B2bD[:, 1]
        return dual_nll(values_BbD, tangents_BbD, top["head"], mini_batch.targets, head, config.vocab_size)

    def forward_period(names, x_B2bD, i):  # block i of each stack; keeps the hidden states before each block
        block_inputs = {}
        for name in names:
            block_inputs[name] = x_B2bD
            run, operands = dual_block(name, i, sums)
            x_B2bD, _ = run(*operands, x_B2bD)
        return x_B2bD, block_inputs

    def reverse_period(names, carry, step):
        i, block_inputs = step
        for name in reversed(names):
            x_bar_B2bD, sums = carry
            run, operands = dual_block(name, i, sums)
            _, pull = jax.vjp(run, *operands, block_inputs[name])
            state_bar = _take(sums.states[name], i, axis=1)
            fast_bar, slow_bar, state_bar, x_bar_B2bD = pull((x_bar_B2bD, state_bar))
            sums = Cotangents(
                sums.fast | {name: _add(sums.fast[name], fast_bar, i, axis=1)},
                sums.slow | {name: _add(sums.slow[name], slow_bar, i, axis=0)},
                sums.states | {name: _put(sums.states[name], state_bar, i, axis=1)},
            )
            carry = x_bar_B2bD, sums
        return carry, None

    x_B2bD, kept = jax.vmap(partial(DualPass().begin, in_scan=True))(mini_batch.hidden), []
    for segment in by_segment(stacks):
        names, (num_periods, *_) = tuple(segment), map(num_blocks, segment.values())
        x_B2bD, block_inputs = jax.lax.scan(partial(forward_period, names), x_B2bD, jnp.arange(num_periods))
        kept.append((names, (jnp.arange(num_periods), block_inputs)))
    _, pull = jax.vjp(dual_top, top, x_B2bD)
    top_bar, x_bar_B2bD = pull(seeds)
    carry = x_bar_B2bD, sums._replace(slow={name: sums.slow[name] for name in stacks})
    for names, steps in reversed(kept):
        carry, _ = jax.lax.scan(partial(reverse_period, names), carry, steps, reverse=True)
    x_bar_B2bD, block_sums = carry
    top_sum = jax.tree.map(jnp.add, {name: sums.slow[name] for name in top}, top_bar)
    return block_sums._replace(slow=block_sums.slow | top_sum), x_bar_B2bD[:, 0]


def _dual_block(block_def, context: Context, u, fast, slow, state, x_B2bD):
    """Runs a block on values and tangents: returns (hidden states [B, 2, b, D], State after the mini-batch)."""

    def run(directed, x_2bD, state):
        block = merge(block_def, directed, slow)
        x_2bD, entry = block.extend(x_2bD, DualPass(), state, context)
        return x_2bD, block.advance(state, entry)

    return jax.vmap(run)(jax.tree.map(Directed, fast, u), x_B2bD, state)


def _take(stacked, i, axis: int):
    """Takes entry i of the axis over blocks."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, axis, keepdims=False), stacked)


def _put(stacked, new, i, axis: int):
    """Replaces entry i of the axis over blocks."""
    return jax.tree.map(lambda a, n: jax.lax.dynamic_update_index_in_dim(a, n, i, axis), stacked, new)


def _add(sums, new, i, axis: int):
    """Adds to entry i of the axis over blocks."""
    return _put(sums, jax.tree.map(jnp.add, _take(sums, i, axis), new), i, axis)
