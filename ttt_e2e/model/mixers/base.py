"""Sequence mixers (attention, or a recurrence): the protocol of a mixer, and the registry.

A mixer is one file: a subclass of `Mixer`, registered under the name by which `config.model.mixer` asks for it. Its
methods are written for one sequence; callers batch them with `jax.vmap`. It carries four pytrees of floating arrays
from mini-batch to mini-batch. Their contents are its own choice, but for weights, which they must not hold:

    State   all that it needs of the mini-batches before this one: a KV cache, or a recurrent state
    Entry   what one mini-batch contributes: new keys and values, or the recurrent state after the mini-batch
    Log     residual of the reverse pass: the first State and all Entries, such that the State before each mini-batch is
            a slice of it
    Draft   only in decoding: what the tokens of an unfinished mini-batch contributed, predicted one by one

How they meet (attention in parentheses):

    reading     output, entry = extend(x, state)      state = advance(state, entry)   (appends to the KV cache)
    training    the same in the forward pass; log = log(first state, all entries); in reverse, state_i = at(log, i)
    decoding    prepared = prepare(state)             (rotates the cached keys once)
                draft = draft(state, b)               (an empty cache of b positions)
                output, added = decode(x, prepared, draft)      draft = append(draft, added)    for each token

The defaults are those of a recurrent mixer, whose Entry is its next State. docs/mixers.md has a whole example.

Shapes: `T` positions, `b` inner mini-batch, `M` mini-batches of a sequence, `D` model width.
"""

import importlib
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.config import MIXER_SECTIONS, MIXERS
from ttt_e2e.model.passes import Pass
from ttt_e2e.model.sequence_parts import SequenceParts


class Context(NamedTuple):
    """Says where the given positions stand in their sequence; the same for all sequences of a batch."""

    start: Any = 0  # number of positions before the mini-batch, those that the State summarises
    # In `extend`: number of tokens in the mini-batch, with padding after them; None = no padding. In `decode`: number
    # of tokens of the mini-batch before this one.
    count: Any = None
    parts: SequenceParts | None = None  # how the sequence is divided, where the positions are one device's part of it
    tokens: Any = None  # ids of the given positions, for Engram (engram.py); None where no block has one


class Mixer(nnx.Module):
    """Maps normed hidden states [T, D] to what the block adds to the residual stream [T, D].

    All expensive results are computed through the argument `compute`, the kind of pass (passes.py): products with
    weights by `compute.product`, anything else by `compute.call`.
    """

    label = "mixer"  # what its parameters are called in checkpoints: "prefix.LABEL.wq", "prefix.LABEL_norm.weight"
    grows = False  # whether its State grows with the sequence
    # Heads that its dimensions named "heads" hold: the mesh axis `model` divides these where it divides the heads.
    num_heads = 1

    @abstractmethod
    def whole(self, x_TD, compute: Pass, context: Context):
        """Computes the output [T, D] of a whole sequence, as the prefix runs it in training."""

    @abstractmethod
    def extend(self, x_bD, compute: Pass, state, context: Context):
        """Runs a mini-batch, given the State before it: returns (output [b, D], Entry).

        An Entry must not have tangents: `compute.value` drops them. With padding (`context.count`), the Entry of a
        recurrent mixer is its state after the last token, not after the padding.
        """

    def decode(self, x_1D, compute: Pass, prepared, draft, context: Context):
        """Runs the next token of an unfinished mini-batch: returns (output [1, D], what `append` adds to the Draft).

        prepared: the State before the mini-batch, as `prepare` returns it.
        draft: the Draft after the tokens of the mini-batch before this one.
        """
        raise NotImplementedError

    @abstractmethod
    def empty(self, capacity: int):
        """Makes the State before the first token, with room for `capacity` positions."""

    @abstractmethod
    def flops(self, seq_len: int) -> float:
        """Counts the FLOPs of one forward pass, per token of a sequence of this length."""

    def capacity(self, seq_len: int) -> int:
        """Counts the positions that a State needs room for, to read a sequence of `seq_len` tokens."""
        return 0

    def resize(self, state, capacity: int):
        """Gives a State room for more positions, or for fewer where the oldest are out of reach."""
        return state

    def advance(self, state, entry):
        """Computes the State after a mini-batch from the one before it and the Entry."""
        return entry

    def log(self, first, entries_M):
        """Makes the Log of M mini-batches from the State before the first and the Entries, with a leading axis M."""
        return jax.tree.map(lambda s, e: jnp.concatenate([s[None], e[:-1]]), first, entries_M)

    def at(self, log, i, take: Callable):
        """Slices the State before mini-batch i out of the Log, by one call of `take` for each array.

        take: (array, start, size, axis) -> the slice of `size` entries from `start`. Give `axis` counted from the end:
            the arrays may have more leading axes (sequences, blocks), which only the caller knows.
        """
        first = jax.eval_shape(lambda: self.empty(0))
        return jax.tree.map(lambda a, s: jnp.squeeze(take(a, i, 1, -1 - s.ndim), -1 - s.ndim), log, first)

    def draft(self, state, b: int, entry=None, count=0):
        """Makes the Draft after the first `count` tokens of a mini-batch of b with this Entry (None: no token)."""
        return state if entry is None else entry

    def append(self, draft, added, count):
        """Adds to the Draft what `decode` returned for a token, after the first `count` of the mini-batch."""
        return added

    def prepare(self, state):
        """Prepares a State for `decode`: computes what is the same for all tokens of a mini-batch."""
        return state

    def received(self, T: int, num_parts: int) -> float:
        """Counts the numbers that a device receives in one forward pass, with T positions of each of `num_parts`
        devices.

        Only asked of mixers without an obstacle to "sequence axis".
        """
        raise NotImplementedError

    def obstacle(self, use: str) -> str:
        """Says why the mixer cannot serve a use, or returns "" where it can. Ends a message: "..., which OBSTACLE".

        use: "decode", predicting token by token; "sequence axis", a prefix whose positions are divided over devices;
            "twice differentiable", a suffix block under the exact meta-gradient.
        """
        if use == "decode" and type(self).decode is Mixer.decode:
            return "predicts no single tokens (it has no `decode`)"
        if use == "sequence axis":
            return "does not divide the positions of a sequence over devices"
        return ""


_MIXERS: dict[str, Callable] = {}


def register(name: str, make: Callable, section: type | None = None) -> None:
    """Registers a mixer under a name.

    Args:
      name: the word in `config.model.mixer`. In this directory, a mixer has the name of its file, which is imported
        when it is asked for; a mixer elsewhere must be registered before the config is made.
      make: (config.model, rngs) -> Mixer.
      section: dataclass of the mixer's own config fields, each a `config.fields.field`. They are set as
        `config.model.NAME.FIELD`, and read as `config.section(NAME).FIELD`.
    """
    _MIXERS[name] = make
    if name not in MIXERS:
        MIXERS.append(name)
    if section:
        MIXER_SECTIONS[name] = section


def make_mixer(name: str, config, rngs: nnx.Rngs) -> Mixer:
    """Makes a mixer with freshly initialised parameters."""
    if name not in _MIXERS:
        importlib.import_module(f"ttt_e2e.model.mixers.{name}")
    return _MIXERS[name](config, rngs)
