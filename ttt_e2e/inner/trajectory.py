"""What rebuilds the fast weights W_i on the way back (`inner.trajectory`).

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

import jax
import jax.numpy as jnp

from ttt_e2e.config import InnerConfig
from ttt_e2e.inner.step import sgd_update


def take_step(inner: InnerConfig, fast, gradient, rate):
    """(W_{i+1}, what is saved of step i; segments save nothing of a single step)."""
    if inner.trajectory != "delta":
        return sgd_update(fast, gradient, rate), fast if inner.trajectory == "store" else None
    update = jax.tree.map(lambda g: (rate * g).astype(jnp.bfloat16), gradient)
    return jax.tree.map(lambda w, d: w - d.astype(w.dtype), fast, update), update


def scan(inner: InnerConfig, inner_step: Callable, carry, steps):
    """`jax.lax.scan` of the forward pass; the fast weights are the first item of the carry.

    inner_step: (carry, step) -> (carry, (outputs, saved)), with `saved` = (from `take_step`, known).

    Returns:
      The final carry, and (outputs, what is saved for `reverse_scan`).
    """
    if inner.trajectory != "segment":
        return jax.lax.scan(inner_step, carry, steps)

    def run_segment(carry, segment):
        start = carry[0]
        carry, (outputs, _) = jax.lax.scan(inner_step, carry, segment)
        return carry, (outputs, start)

    carry, (outputs, starts) = jax.lax.scan(run_segment, carry, _segments(inner, steps))
    return carry, (jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs), starts)


def reverse_scan(inner: InnerConfig, reverse_step: Callable, replay_step: Callable, carry, final, saved, steps):
    """`jax.lax.scan` of the backward pass, from the last step to the first.

    Args:
      reverse_step: (carry, W_i, W_i - W_{i+1}, known, step) -> (carry, outputs).
      replay_step: (W_i, step) -> (W_{i+1}, known), as in the forward pass.
      carry: of the last step.
      final: W_M.
      saved: what `scan` saved.
      steps: what each step reads; leading axis M.

    Returns:
      The first step's carry, and the outputs stacked.
    """

    def undo(next_fast_and_carry, saved_and_step):
        next_fast, carry = next_fast_and_carry
        (saved, known), step = saved_and_step
        if inner.trajectory == "delta":
            update = jax.tree.map(lambda d, w: d.astype(w.dtype), saved, next_fast)
            fast = jax.tree.map(jnp.add, next_fast, update)
        else:
            fast = saved
            update = jax.tree.map(jnp.subtract, fast, next_fast)
        carry, outputs = reverse_step(carry, fast, update, known, step)
        return (fast, carry), outputs

    if inner.trajectory != "segment":
        (_, carry), outputs = jax.lax.scan(undo, (final, carry), (saved, steps), reverse=True)
        return carry, outputs

    def undo_segment(next_fast_and_carry, start_and_segment):
        start, segment = start_and_segment

        def redo(fast, step):
            next_fast, known = replay_step(fast, step)
            return next_fast, (fast, known)

        _, saved = jax.lax.scan(redo, start, segment)
        return jax.lax.scan(undo, next_fast_and_carry, (saved, segment), reverse=True)

    segments = _segments(inner, steps)
    (_, carry), outputs = jax.lax.scan(undo_segment, (final, carry), (saved, segments), reverse=True)
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)


def segment_length(inner: InnerConfig, num_mini_batches: int) -> int:
    """Mini-batches of a segment: as configured, or the divisor of their number that is nearest to its square root."""
    divisors = [n for n in range(1, num_mini_batches + 1) if num_mini_batches % n == 0]
    return inner.segment_length or min(divisors, key=lambda n: abs(n - math.sqrt(num_mini_batches)))


def _segments(inner: InnerConfig, steps):
    length = segment_length(inner, len(jax.tree.leaves(steps)[0]))
    return jax.tree.map(lambda a: a.reshape(-1, length, *a.shape[1:]), steps)
