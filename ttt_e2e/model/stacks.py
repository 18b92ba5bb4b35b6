"""Stacks of blocks: many blocks as one `Block` module, whose parameters have a leading axis L over the blocks.

A stack runs under `jax.lax.scan`, so that neither the program nor its compile time grows with depth.

A mixer pattern such as "window,window,attention" repeats along the depth of the model. Each slot of the pattern has a
stack of its own, and one step of the scan runs one *period*: a block of each stack, in order. So slots may differ in
kind, and no stack is sliced. Where the prefix or the suffix is no whole number of patterns, it has several *segments*,
each of which repeats a pattern of its own, and which run one after another.

If the prefix has one stack, it is called "prefix"; several are called "prefix_0", "prefix_1", ... in the order in which
they run. Those of the suffix likewise.

Shapes: `T` positions, `M` mini-batches of a sequence, `D` model width, `L` blocks of a stack.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.block import Block

LIST_LENGTH = 9  # mixers; checkpoints of shorter patterns that are used once have a stack for each block


class Segment(NamedTuple):
    """Consecutive blocks whose kinds repeat a pattern."""

    pattern: tuple  # kinds of the blocks of a period: one for each stack
    periods: int


def segments_of(kinds: Sequence, pattern_length: int) -> list[Segment]:
    """Divides blocks into segments, given the kind of each and the length of the pattern that repeats in the model.

    If a whole number of these patterns makes up the blocks, there is one segment; but a long pattern that is used once
    is a list of all blocks. In that case, and otherwise, the segments have as few stacks as can be, and then are as few
    as can be.
    """
    kinds = tuple(kinds)
    periods, rest = divmod(len(kinds), pattern_length)
    is_list = periods == 1 and pattern_length >= LIST_LENGTH
    if not rest and not is_list and kinds == kinds[:pattern_length] * periods:
        return [Segment(kinds[:pattern_length], periods)]
    return list(_fewest_stacks(kinds))


@lru_cache
def _fewest_stacks(kinds: tuple) -> tuple[Segment, ...]:
    """The segments of blocks of these kinds with the fewest stacks, of these the fewest segments."""
    if not kinds:
        return ()
    candidates = []
    for length in range(1, len(kinds) + 1):
        periods = 1
        while kinds[length * periods : length * (periods + 1)] == kinds[:length]:
            periods += 1
        first = Segment(kinds[:length], periods)
        candidates.append((first, *_fewest_stacks(kinds[length * periods :])))
    return min(candidates, key=lambda found: (sum(len(segment.pattern) for segment in found), len(found)))


class Kind(NamedTuple):
    """What distinguishes blocks that cannot be in one stack."""

    mixer: str
    engram: int | None = None  # index of the block, if it has an Engram, whose hashes and tables are its own


def make_stacks(part: str, kinds: Sequence[Kind], config, rngs: nnx.Rngs, *, fast: bool) -> dict[str, Block]:
    """Initialises the blocks of the prefix or the suffix independently, {name: stack}, in the order in which they run.

    kinds: kind of each block.
    """
    keys = jax.random.split(rngs.params(), len(kinds))
    segments = segments_of(kinds, len(config.mixers))
    count = sum(len(segment.pattern) for segment in segments)
    names = iter([part] if count == 1 else [f"{part}_{i}" for i in range(count)])
    stacks, start = {}, 0
    for number, (pattern, periods) in enumerate(segments):
        stop = start + len(pattern) * periods
        for i, kind in enumerate(pattern):

            def make(key, kind=kind, number=number):
                return Block(config, nnx.Rngs(params=key), **kind._asdict(), fast=fast, segment=number)

            graphdef = nnx.graphdef(nnx.eval_shape(lambda make=make: make(keys[0])))
            state = jax.vmap(lambda key, make=make: nnx.state(make(key)))(keys[start + i : stop : len(pattern)])
            stacks[next(names)] = nnx.merge(graphdef, state)
        start = stop
    return stacks


def num_blocks(stack: Block) -> int:
    """Counts the blocks L of a stack."""
    return stack.mlp_norm.weight.get_value().shape[0]


def block_indices(stacks: dict[str, Block]) -> dict[str, list[int]]:
    """Lists the indices of the blocks of each stack of the prefix or the suffix, in the order in which they run."""
    indices, start = {}, 0
    for segment in by_segment(stacks):
        count = sum(num_blocks(stack) for stack in segment.values())
        for i, name in enumerate(segment):
            indices[name] = list(range(start + i, start + count, len(segment)))
        start += count
    return indices


def by_segment(stacks: dict[str, Block]) -> list[dict[str, Block]]:
    """Groups the stacks of the prefix or the suffix by segments, in the order in which they run."""
    return [dict(group) for _, group in itertools.groupby(stacks.items(), key=lambda item: item[1].segment)]


class Stacks(nnx.Module):
    """Holds stacks of blocks, and maps the methods of `Block` that make and change States over all of their blocks.

    States, Entries, Logs and Drafts (mixers/base.py) are those of one sequence, as {name of stack: pytree with a
    leading axis L over the blocks of the stack}. Each method below does for all blocks what the method of that name in
    `Block` does for one.
    """

    def _set_stacks(self, stacks: dict[str, Block]) -> None:
        self.names = tuple(stacks)
        for name, stack in stacks.items():
            setattr(self, name, stack)

    @property
    def stacks(self) -> dict[str, Block]:
        """The stacks, in the order in which their blocks run."""
        return {name: getattr(self, name) for name in self.names}

    @property
    def grows(self) -> bool:
        """Whether any mixer's State grows with the sequence, as a full KV cache does."""
        return any(stack.mixer.grows for stack in self.stacks.values())

    def obstacle(self, use: str, stacks: dict[str, Block] | None = None) -> str:
        """Says which mixer cannot serve a use (`Block.obstacle`) and why, or returns "" where all can.

        stacks: those to ask; None = all.
        """
        for stack in (self.stacks if stacks is None else stacks).values():
            if obstacle := stack.obstacle(use):
                return obstacle
        return ""

    def empty(self, seq_len: int) -> dict:
        """Makes the States before the first token (empty KV caches), with room for a sequence of `seq_len` tokens."""

        def of_stack(stack: Block):
            L = num_blocks(stack)
            state = stack.empty(stack.capacity(seq_len))
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (L, *a.shape)), state)

        return {name: of_stack(stack) for name, stack in self.stacks.items()}

    def resize(self, states: dict, seq_len: int) -> dict:
        """Gives States room for a sequence of `seq_len` tokens."""

        def of_stack(stack: Block, state):
            return jax.vmap(lambda block_state: stack.resize(block_state, stack.capacity(seq_len)))(state)

        return {name: of_stack(self.stacks[name], state) for name, state in states.items()}

    def advance(self, states: dict, entries: dict) -> dict:
        """Computes the States after a mini-batch from those before it and its Entries."""
        return {name: jax.vmap(self.stacks[name].advance)(state, entries[name]) for name, state in states.items()}

    def log(self, first: dict, entries_ML: dict) -> dict:
        """Makes the Logs of M mini-batches from the States before the first and all Entries (axes [M, L, ...])."""
        return {
            name: jax.vmap(self.stacks[name].log, in_axes=(0, 1))(state, entries_ML[name])
            for name, state in first.items()
        }

    def at(self, log: dict, i, take: Callable = jax.lax.dynamic_slice_in_dim) -> dict:
        """Slices the States before mini-batch i out of the Logs. More leading axes of the Logs are axes of the States,
        too.

        take: (array, start, size, axis) -> the slice of `size` entries from `start`.
        """
        return {name: self.stacks[name].at(stack_log, i, take) for name, stack_log in log.items()}

    def prepare(self, states: dict) -> dict:
        """Prepares States for `decode`, once for all tokens of a mini-batch."""
        return {name: jax.vmap(self.stacks[name].prepare)(state) for name, state in states.items()}

    def append(self, drafts: dict, added: dict, count) -> dict:
        """Adds a token to the Drafts, after the first `count` of the mini-batch."""

        def of_stack(stack: Block, draft, added):
            return jax.vmap(lambda *block: stack.append(*block, count))(draft, added)

        return {name: of_stack(self.stacks[name], draft, added[name]) for name, draft in drafts.items()}

    def draft(self, states: dict, b: int, entries: dict | None = None, count=0) -> dict:
        """Makes the Drafts after the first `count` tokens of a mini-batch of b, whose Entries are `entries`."""

        def of_stack(stack: Block, state, entry):
            return jax.vmap(lambda state, entry: stack.draft(state, b, entry, count))(state, entry)

        return {name: of_stack(self.stacks[name], state, entries and entries[name]) for name, state in states.items()}


def scan_blocks(
    stacks: dict[str, Block],
    run_block: Callable,
    x_TD,
    of_blocks: dict | None = None,
    *,
    remat: bool = False,
    unroll: bool = False,
    fetch: Callable = lambda name, state: state,
):
    """Runs blocks one after another: of each segment a block of each stack in turn, then the next of each.

    Args:
      stacks: by name, in order; those of the prefix, or of the suffix.
      run_block: (block, x_TD, *of_block) -> (x_TD, output).
      x_TD: hidden states before the first block.
      of_blocks: {stack: tuple of pytrees with a leading axis L}: each block's own arguments `of_block`.
      remat: whether each block is rematerialised in the backward pass.
      unroll: whether to write the blocks out one after another, instead of a scan that slices stacked arrays. Not
        together with `remat`: outside of a scan, XLA merges the recomputation with the first computation (CSE).
      fetch: (stack, a block's weights as they are stored) -> the weights as they are computed with, e.g. gathered over
        devices. It is rematerialised with the block.

    Returns:
      Hidden states after the last block, and {stack: outputs with a leading axis L}.
    """
    graphdefs, blocks = {}, {}
    for name, stack in stacks.items():
        graphdefs[name], state = nnx.split(stack)
        blocks[name] = state, (of_blocks[name] if of_blocks else ())

    def run(name, x_TD, state, of_block):
        return run_block(nnx.merge(graphdefs[name], fetch(name, state)), x_TD, *of_block)

    def run_period(x_TD, period):
        # In reverse, a period of several blocks would recompute them all at once, as nothing orders them; the barrier
        # of `prevent_cse` makes each wait for the cotangent of the next.
        run_one = jax.checkpoint(run, static_argnums=0, prevent_cse=len(period) > 1) if remat else run
        outputs = {}
        for name, block in period.items():
            x_TD, outputs[name] = run_one(name, x_TD, *block)
        return x_TD, outputs

    outputs = {}
    for segment in by_segment(stacks):
        periods = {name: blocks[name] for name in segment}
        x_TD, outputs_L = (_unrolled if unroll else jax.lax.scan)(run_period, x_TD, periods)
        outputs |= outputs_L
    return x_TD, outputs


def _unrolled(step: Callable, carry, inputs_L):
    """Does what `jax.lax.scan` does, written out step by step."""
    outputs = []
    for i in range(len(jax.tree.leaves(inputs_L)[0])):
        carry, output = step(carry, jax.tree.map(lambda a, i=i: a[i], inputs_L))
        outputs.append(output)
    return carry, jax.tree.map(lambda *arrays: jnp.stack(arrays), *outputs)
