"""Policies by which the reverse scan rebuilds the fast weights W_i (`inner.trajectory`).

    "store"    every W_i, float32
    "delta"    every update, rounded to bfloat16; the forward pass applies the rounded one, so that adding it back is
               exact up to float32 addition
    "segment"  every `inner.segment_length`-th W_i; those in between are recomputed, a segment at a time
"auto" must have been replaced by one of these (memory.py).

What else a step tells its reverse (`known`) is saved with it, in segments when they are recomputed.

Shapes: `M` mini-batches of the sequence, `n` of a segment.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.config import InnerConfig
from ttt_e2e.inner.step import sgd_update


class Step(NamedTuple):
    """One step of a stored trajectory. Slices W_i and W_{i+1} out of the stacked weights where they are used."""

    first: Any  # W of the first step of all those in `next_n`
    next_n: Any  # W after each of them
    i: jax.Array  # which of them this is

    def weights(self, stack: str = "", block=None):
        """(W_i, W_i - W_{i+1}); of one block of a stack [B, L, ...] where its name and the block's index are given."""
        first, next_n = (self.first[stack], self.next_n[stack]) if stack else (self.first, self.next_n)
        if stack:
            first = jax.tree.map(partial(_entry, i=block, axis=1), first)
        next_fast, before = (jax.tree.map(partial(_entry, i=i, block=block), next_n) for i in (self.i, self.i - 1))
        fast = jax.tree.map(partial(jnp.where, self.i == 0), first, before)
        return fast, jax.tree.map(jnp.subtract, fast, next_fast)


class RoundedStep(NamedTuple):
    """One step of which W_{i+1} and the (rounded) update are stored, and W_i is their sum."""

    next_fast: Any
    update: Any

    def weights(self, stack: str = "", block=None):
        """(W_i, W_i - W_{i+1}), as `Step.weights`."""
        next_fast, update = self
        if stack:
            next_fast, update = jax.tree.map(partial(_entry, i=block, axis=1), (next_fast[stack], update[stack]))
        update = jax.tree.map(lambda d, w: d.astype(w.dtype), update, next_fast)
        return jax.tree.map(jnp.add, next_fast, update), update


def take_step(inner: InnerConfig, fast, gradient, rate):
    """(W_{i+1}, what is saved of step i; segments save nothing of a single step)."""
    if inner.trajectory != "delta":
        next_fast = sgd_update(fast, gradient, rate)
        return next_fast, next_fast if inner.trajectory == "store" else None
    update = jax.tree.map(lambda g: (rate * g).astype(jnp.bfloat16), gradient)
    return jax.tree.map(lambda w, d: w - d.astype(w.dtype), fast, update), update


def scan(inner: InnerConfig, inner_step: Callable, carry, steps):
    """`jax.lax.scan` of the forward pass; the fast weights are the first item of the carry.

    inner_step: (carry, step) -> (carry, (outputs, saved)), with `saved` = (from `take_step`, known).

    Returns:
      The final carry, and (outputs, what is saved for `reverse_scan`).
    """
    first = carry[0]
    if inner.trajectory != "segment":
        carry, (outputs, (saved_M, known_M)) = jax.lax.scan(inner_step, carry, steps)
        return carry, (outputs, (carry[0] if inner.trajectory == "delta" else first, saved_M, known_M))

    def run_segment(carry, segment):
        start = carry[0]
        carry, (outputs, _) = jax.lax.scan(inner_step, carry, segment)
        return carry, (outputs, start)

    carry, (outputs, starts) = jax.lax.scan(run_segment, carry, _segments(inner, steps))
    return carry, (jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs), starts)


def reverse_scan(inner: InnerConfig, reverse_step: Callable, replay_step: Callable, carry, saved, steps):
    """`jax.lax.scan` of the backward pass, from the last step to the first.

    Args:
      reverse_step: (carry, `Step` or `RoundedStep`, known, step) -> (carry, outputs).
      replay_step: (W_i, step) -> (W_{i+1}, known), as in the forward pass.
      carry: of the last step.
      saved: what `scan` saved.
      steps: what each step reads; leading axis M.

    Returns:
      The first step's carry, and the outputs stacked.
    """
    if inner.trajectory == "delta":
        final, update_M, known_M = saved

        def undo_rounded(carry, step):
            next_fast, carry = carry
            update, known, step = step
            taken = RoundedStep(next_fast, update)
            carry, outputs = reverse_step(carry, taken, known, step)
            return (taken.weights()[0], carry), outputs

        (_, carry), outputs = jax.lax.scan(undo_rounded, (final, carry), (update_M, known_M, steps), reverse=True)
        return carry, outputs

    def undo_all(carry, first, next_n, known_n, steps):
        def undo(carry, step):
            i, known, step = step
            return reverse_step(carry, Step(first, next_n, i), known, step)

        places = jnp.arange(len(jax.tree.leaves(steps)[0]))
        return jax.lax.scan(undo, carry, (places, known_n, steps), reverse=True)

    if inner.trajectory == "store":
        return undo_all(carry, *saved, steps)

    def undo_segment(carry, start_and_segment):
        start, segment = start_and_segment

        def redo(fast, step):
            next_fast, known = replay_step(fast, step)
            return next_fast, (next_fast, known)

        _, (next_n, known_n) = jax.lax.scan(redo, start, segment)
        return undo_all(carry, start, next_n, known_n, segment)

    carry, outputs = jax.lax.scan(undo_segment, carry, (saved, _segments(inner, steps)), reverse=True)
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)


def segment_length(inner: InnerConfig, num_mini_batches: int) -> int:
    """Mini-batches of a segment: as configured, or the divisor of their number that is nearest to its square root."""
    divisors = [n for n in range(1, num_mini_batches + 1) if num_mini_batches % n == 0]
    return inner.segment_length or min(divisors, key=lambda n: abs(n - math.sqrt(num_mini_batches)))


def _segments(inner: InnerConfig, steps):
    length = segment_length(inner, len(jax.tree.leaves(steps)[0]))
    return jax.tree.map(lambda a: a.reshape(-1, length, *a.shape[1:]), steps)


def _entry(stacked, i, axis=0, block=None):
    """Entry i along an axis; with `block`, of that the entry `block` along its second axis, in one slice of `stacked`.

    Two slices, one after the other, would make XLA copy the whole entry for each block, or before all of them.
    """
    starts, sizes = [0] * stacked.ndim, list(stacked.shape)
    for place, at in ((i, axis), (block, axis + 2)):
        if place is not None:
            starts[at], sizes[at] = jnp.maximum(place, 0), 1
    taken = jax.lax.dynamic_slice(stacked, starts, sizes)
    return jnp.squeeze(taken, axis if block is None else (axis, axis + 2))
