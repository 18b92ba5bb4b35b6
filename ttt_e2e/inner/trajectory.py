"""Policies by which the reverse scan rebuilds the fast weights W_i (`inner.trajectory`): what the forward scan saves.

    "store"    every W_i, float32
    "delta"    every update, rounded to bfloat16, and the last W; the forward pass applies the rounded update, so that
               adding it back is exact up to float32 addition
    "segment"  every `inner.segment_length`-th W_i; the others are recomputed, a segment at a time

"auto" must have been replaced by one of these (memory.py).

A step of the forward scan may hand other intermediates to its reverse. They are saved for every step under "store" and
"delta", and recomputed with the W_i under "segment".

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
    """Step i of n steps whose weights are stored. W_i and W_{i+1} are sliced out of the stacked weights when used."""

    first: Any  # W before the first of the n steps
    next_n: Any  # W after each of the n steps: entry i is W_{i+1}, entry i - 1 is W_i
    i: jax.Array

    def weights(self, stack: str = "", block=None):
        """Returns (W_i, W_i - W_{i+1}); those of one block of a stack [B, L, ...] if its name and index are given."""
        first, next_n = (self.first[stack], self.next_n[stack]) if stack else (self.first, self.next_n)
        if stack:
            first = jax.tree.map(partial(_entry, i=block, axis=1), first)
        next_fast, before = (jax.tree.map(partial(_entry, i=i, block=block), next_n) for i in (self.i, self.i - 1))
        fast = jax.tree.map(partial(jnp.where, self.i == 0), first, before)
        return fast, jax.tree.map(jnp.subtract, fast, next_fast)


class RoundedStep(NamedTuple):
    """A step whose W_{i+1} and rounded update W_i - W_{i+1} are given; W_i is their sum."""

    next_fast: Any
    update: Any

    def weights(self, stack: str = "", block=None):
        """Returns (W_i, W_i - W_{i+1}), as `Step.weights`."""
        next_fast, update = self
        if stack:
            next_fast, update = jax.tree.map(partial(_entry, i=block, axis=1), (next_fast[stack], update[stack]))
        update = jax.tree.map(lambda d, w: d.astype(w.dtype), update, next_fast)
        return jax.tree.map(jnp.add, next_fast, update), update


def take_step(inner: InnerConfig, fast, gradient, rate):
    """Takes inner step i: returns (W_{i+1}, what is saved of the step: W_{i+1}, the rounded update, or None)."""
    if inner.trajectory != "delta":
        next_fast = sgd_update(fast, gradient, rate)
        return next_fast, next_fast if inner.trajectory == "store" else None
    update = jax.tree.map(lambda g: (rate * g).astype(jnp.bfloat16), gradient)
    return jax.tree.map(lambda w, d: w - d.astype(w.dtype), fast, update), update


def scan(inner: InnerConfig, inner_step: Callable, carry, steps):
    """Runs the forward pass, as `jax.lax.scan` does; the fast weights are the first item of the carry.

    inner_step: (carry, step) -> (carry, (outputs, (what `take_step` saves, intermediates for the reverse))).

    Returns:
      The final carry, and (outputs, saved). What `saved` is, which `reverse_scan` takes, depends on the policy:

        "store"    (W_0, all W_{i+1}, intermediates of all steps)
        "delta"    (W after the last step, all updates, intermediates of all steps)
        "segment"  W at the beginning of each segment
    """
    first = carry[0]
    if inner.trajectory != "segment":
        carry, (outputs, (saved_M, intermediates_M)) = jax.lax.scan(inner_step, carry, steps)
        return carry, (outputs, (carry[0] if inner.trajectory == "delta" else first, saved_M, intermediates_M))

    def run_segment(carry, segment):
        start = carry[0]
        carry, (outputs, _) = jax.lax.scan(inner_step, carry, segment)
        return carry, (outputs, start)

    carry, (outputs, starts) = jax.lax.scan(run_segment, carry, _segments(inner, steps))
    return carry, (jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs), starts)


def reverse_scan(inner: InnerConfig, reverse_step: Callable, replay_step: Callable, carry, saved, steps):
    """Runs the reverse pass, as a `jax.lax.scan` from the last step to the first.

    Args:
      reverse_step: (carry, `Step` or `RoundedStep`, intermediates, step) -> (carry, outputs).
      replay_step: (W_i, step) -> (W_{i+1}, intermediates), as in the forward pass; only for "segment".
      carry: carry that the last step starts from, the cotangents after it.
      saved: what `scan` returned.
      steps: inputs of the steps, with a leading axis M.

    Returns:
      The carry after step 0, and the outputs with a leading axis M.
    """
    if inner.trajectory == "delta":
        final, update_M, intermediates_M = saved

        def reverse_rounded(carry, step):
            next_fast, carry = carry
            update, intermediates, step = step
            inner_step = RoundedStep(next_fast, update)
            carry, outputs = reverse_step(carry, inner_step, intermediates, step)
            return (inner_step.weights()[0], carry), outputs

        (_, carry), outputs = jax.lax.scan(
            reverse_rounded, (final, carry), (update_M, intermediates_M, steps), reverse=True
        )
        return carry, outputs

    def reverse_stored(carry, first, next_n, intermediates_n, steps):
        def reverse_one(carry, step):
            i, intermediates, step = step
            return reverse_step(carry, Step(first, next_n, i), intermediates, step)

        places = jnp.arange(len(jax.tree.leaves(steps)[0]))
        return jax.lax.scan(reverse_one, carry, (places, intermediates_n, steps), reverse=True)

    if inner.trajectory == "store":
        return reverse_stored(carry, *saved, steps)

    def reverse_segment(carry, start_and_segment):
        start, segment = start_and_segment

        def replay_one(fast, step):
            next_fast, intermediates = replay_step(fast, step)
            return next_fast, (next_fast, intermediates)

        _, (next_n, intermediates_n) = jax.lax.scan(replay_one, start, segment)
        return reverse_stored(carry, start, next_n, intermediates_n, segment)

    carry, outputs = jax.lax.scan(reverse_segment, carry, (saved, _segments(inner, steps)), reverse=True)
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)


def segment_length(inner: InnerConfig, num_mini_batches: int) -> int:
    """Returns the steps of a segment: as configured, or the divisor of all steps nearest to their square root."""
    divisors = [n for n in range(1, num_mini_batches + 1) if num_mini_batches % n == 0]
    return inner.segment_length or min(divisors, key=lambda n: abs(n - math.sqrt(num_mini_batches)))


def _segments(inner: InnerConfig, steps):
    """Reshapes the leading axis [M] of all arrays to [segments, n]."""
    length = segment_length(inner, len(jax.tree.leaves(steps)[0]))
    return jax.tree.map(lambda a: a.reshape(-1, length, *a.shape[1:]), steps)


def _entry(stacked, i, axis=0, block=None):
    """Takes entry i along an axis. With `block`, takes of that, [B, L, ...], the entry `block` of L, in the same slice.

    With two slices, first the entry and then of it, XLA would copy the whole entry.
    """
    starts, sizes = [0] * stacked.ndim, list(stacked.shape)
    for place, at in ((i, axis), (block, axis + 2)):
        if place is not None:
            starts[at], sizes[at] = jnp.maximum(place, 0), 1
    entry = jax.lax.dynamic_slice(stacked, starts, sizes)
    return jnp.squeeze(entry, axis if block is None else (axis, axis + 2))
