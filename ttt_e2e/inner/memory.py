"""Estimates the memory that a meta-gradient takes, from shapes alone, and chooses policies that fit ("auto").

Nothing is computed or compiled: the estimate adds up the residuals that JAX would save for each reverse pass. XLA fuses
some of them away and adds buffers of its own; tests/inner/test_memory.py compares the estimate with compiled programs.

Shapes: `B` sequences, `T` sequence, `M` mini-batches of a sequence, `b` inner mini-batch.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

from ttt_e2e.config import InnerConfig
from ttt_e2e.inner import meta_gradient, trajectory
from ttt_e2e.inner.division import UNDIVIDED, Division, fetch
from ttt_e2e.inner.loop import make_mini_batches, run_prefix, suffix_weights
from ttt_e2e.model.mixers import Context
from ttt_e2e.model.parameters import at_least_float32, merge, split, structure_of

# (trajectory, remat), fewest matrix products first. A slow suffix weight takes, in units of its forward product, 7, 8,
# 9, 10, 10 and 12. "delta" is not here: it rounds the updates, which changes results, and must be asked for by name.
FASTEST_FIRST = (
    ("store", "keep"),
    ("store", "mini_batch"),
    ("segment", "keep"),
    ("store", "block"),
    ("segment", "mini_batch"),
    ("segment", "block"),
)


def choose(
    inner: InnerConfig, graphdef, fast, slow, tokens, budget: int, division: Division = UNDIVIDED
) -> tuple[InnerConfig, int]:
    """Replaces "auto" in `trajectory` and `remat` by the fastest pair that fits the budget, or else by the smallest.

    Args:
      inner: the inner loop's configuration.
      graphdef: static structure of the `Transformer`.
      fast: shapes of its fast weights, or of a device's shards of them.
      slow: shapes of its slow weights, likewise.
      tokens: shape [B, T + 1] of the sequences that one device reads at once.
      budget: bytes that the estimate may reach.
      division: how arrays are divided among devices; then call this inside of the `jax.shard_map` that divides them.

    Returns:
      The configuration, and the bytes estimated for it.
    """
    estimates = {}
    remats = [remat for trajectory, remat in FASTEST_FIRST if trajectory == "store"]
    with_delta = [("delta", remat) for remat in remats] if inner.trajectory == "delta" else []
    for policies in (*FASTEST_FIRST, *with_delta):
        if any(wanted not in ("auto", policy) for wanted, policy in zip((inner.trajectory, inner.remat), policies)):
            continue
        candidate = dataclasses.replace(inner, trajectory=policies[0], remat=policies[1])
        estimates[candidate] = held_bytes(candidate, graphdef, fast, slow, tokens, division)
        if estimates[candidate] <= budget:
            return candidate, estimates[candidate]
    smallest = min(estimates, key=estimates.get)
    return smallest, estimates[smallest]


def held_bytes(inner: InnerConfig, graphdef, fast, slow, tokens, division: Division = UNDIVIDED) -> int:
    """Estimates peak bytes of temporaries of one loss and meta-gradient; arguments as in `choose`, without "auto"."""
    shapes = jax.eval_shape(partial(_held, inner, graphdef, division), fast, slow, tokens)
    size = {name: _bytes(arrays) for name, arrays in shapes.items()}
    prefix = size["prefix"] + size["prefix_block"]
    if "scan" not in shapes:
        return prefix
    # Of each step of the reverse scan: W_i, W_bar, g, u and the update; gradients of slow weights, and their sum.
    carried = 5 * size["fast"] + 2 * size["slow"]
    if inner.remat == "block":  # u and the gradients exist for one block at a time
        carried = 3 * size["fast"] + size["slow"]
    if inner.trajectory == "segment":
        length = trajectory.segment_length(inner, tokens.shape[1] // inner.mini_batch_size)
        carried += length * (size["fast"] + size["recorded"])
    suffix = size["prefix"] + size["scan"] + size["mini_batch"] + size["block"] + carried
    return max(prefix, suffix)


def _held(inner: InnerConfig, graphdef, division: Division, fast, slow, tokens) -> dict:
    """Makes the arrays that live through a step, {term of the estimate: arrays}; only their shapes are used."""
    fast = fetch(division.fast, fast)
    config = structure_of(graphdef, fast, slow).module.config

    def prefix(slow, remat):
        policies = dataclasses.replace(inner, remat=remat)
        return run_prefix(merge(graphdef, fast, slow), tokens, policies, division)

    def saved_by_prefix(remat):
        saved = jax.tree.leaves(jax.vjp(partial(prefix, remat=remat), slow)[1])
        return [a for a in saved if not any(a is w for w in jax.tree.leaves(slow))]  # weights are no temporaries

    held = {"prefix": saved_by_prefix(inner.remat), "prefix_block": ()}
    if inner.remat != "keep" and config.num_prefix_blocks:
        held["prefix_block"] = _share(saved_by_prefix("keep"), config.num_prefix_blocks)
    if not config.num_fast_blocks:
        return held

    suffix_def, one_fast, slow_suffix = split(merge(graphdef, fast, slow).make_suffix())
    fast_B = jax.tree.map(lambda w: jnp.broadcast_to(w, (len(tokens), *w.shape)), one_fast)
    weights = suffix_weights(division, slow_suffix)
    mini_batches = make_mini_batches(prefix(slow, inner.remat), tokens, inner, bos_id=0, division=division)
    _, scan = meta_gradient.forward_scan(suffix_def, inner, weights, fast_B, slow_suffix, mini_batches, jnp.float32(1))
    slow_suffix = scan.slow
    mini_batch = jax.tree.map(lambda a: a[0], scan.mini_batches_M)
    suffix, context = structure_of(suffix_def, one_fast, slow_suffix), Context()
    states = suffix.module.at(scan.log, 0)
    _, head, _, recorded = meta_gradient.gradient_of_suffix(
        suffix, inner, fast_B, slow_suffix, states, context, mini_batch
    )

    def saved_by_reverse(remat):
        policies = dataclasses.replace(inner, remat=remat)
        program = meta_gradient.reverse_program(suffix, policies, fast_B, mini_batch, context, head, recorded)
        return jax.vjp(program, fast_B, states, slow_suffix, mini_batch.hidden)[1]

    gradients = jax.tree.map(lambda w: jnp.zeros(w.shape, at_least_float32(w.dtype)), slow_suffix)
    held |= {"fast": fast_B, "slow": gradients, "scan": scan, "recorded": (head, recorded), "block": ()}
    held["mini_batch"] = saved_by_reverse(inner.remat)
    if inner.remat == "block":
        held["block"] = _share(saved_by_reverse("mini_batch"), config.num_fast_blocks)
    return held


def _share(arrays, count: int):
    """Makes an array of a `count`-th of the bytes of some arrays."""
    return [jnp.zeros(math.ceil(_bytes(arrays) / count), jnp.uint8)]


def _bytes(arrays) -> int:
    """Counts the bytes of all leaves of a tree."""
    return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(arrays))
