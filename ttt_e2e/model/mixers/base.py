"""Sequence mixers: what a block mixes the positions of a sequence with. The protocol, and the registry.

A mixer is one file: a subclass of `Mixer`, registered under the name by which `config.model.mixer` asks for it. Its
methods are written for one sequence; callers batch them with `jax.vmap`. What it carries from mini-batch to mini-batch
is its own affair, in four pytrees of floating arrays, none of which holds weights:

    State   all that it needs of the mini-batches before this one: a KV cache, or a recurrent state
    Entry   what one mini-batch adds to it: new keys and values, or the recurrent state after the mini-batch
    Log     the first State and the Entries of all mini-batches, kept for the reverse pass: the State that each
            mini-batch saw is a slice of it
    Draft   what the tokens of an unfinished mini-batch have added so far, while they are predicted one by one

The defaults are those of a recurrent mixer, whose Entry is its next State. docs/architecture.md has a whole example.

Shapes: `T` positions, `b` inner mini-batch, `M` mini-batches of a sequence, `D` model width.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.config import MIXER_SECTIONS, MIXERS
from ttt_e2e.model.passes import Pass
from ttt_e2e.model.sequence_parts import SequenceParts


class Context(NamedTuple):
    """Place of the given positions in their sequence; the same for all sequences of a batch."""

    start: Any = 0  # positions before the mini-batch: those that the State has seen
    # Positions of the mini-batch that hold tokens, the others being padding at its end; None = all. For `decode`: how
    # many come before this one.
    count: Any = None
    parts: SequenceParts | None = None  # where the positions are one device's part of a sequence: how that is divided


class Mixer(nnx.Module):
    """Mixes positions: normed hidden states [T, D] to what is added to the residual stream [T, D].

    All expensive results go through `compute`, the kind of pass this is (passes.py): products with weights by
    `compute.product`, anything else by `compute.call`.
    """

    label = "mixer"  # what its parameters are called in checkpoints: "prefix.LABEL.wq", "prefix.LABEL_norm.weight"
    grows = False  # whether its State grows with the sequence

    def whole(self, x_TD, compute: Pass, context: Context):
        """Output [T, D] of a whole sequence, as the prefix runs it in training."""
        raise NotImplementedError

    def extend(self, x_bD, compute: Pass, state, context: Context):
        """(output [b, D], Entry) of a mini-batch that follows a State.

        An Entry is a value without a tangent: `compute.value` takes it. Where `context.count` says that some positions
        are padding, an Entry that is a state is that after the last token.
        """
        raise NotImplementedError

    def decode(self, x_1D, compute: Pass, prepared, draft, context: Context):
        """(output [1, D], what the token adds) of the next token of an unfinished mini-batch.

        `prepared` is what `prepare` made of the State; `append` adds to the Draft what the token adds.
        """
        raise NotImplementedError

    def empty(self, capacity: int):
        """The State before anything was read, with room for `capacity` positions."""
        raise NotImplementedError

    def flops(self, seq_len: int) -> float:
        """FLOPs of one forward pass, per token of a sequence of this length."""
        raise NotImplementedError

    def capacity(self, seq_len: int) -> int:
        """Positions that a State must have room for, so that a sequence of `seq_len` tokens can be read."""
        return 0

    def resize(self, state, capacity: int):
        """A State with room for more positions, or for fewer where the oldest are out of reach."""
        return state

    def advance(self, state, entry):
        """The State after a mini-batch."""
        return entry

    def log(self, first, entries_M):
        """The Log of M mini-batches: the State before them, and their Entries."""
        return jax.tree.map(lambda s, e: jnp.concatenate([s[None], e[:-1]]), first, entries_M)

    def at(self, log, i, take: Callable):
        """The State that mini-batch i saw, in one slice of each array.

        take: (array, start, size, axis) -> that slice. The arrays may have leading axes of which `take` knows more, so
            that axes are counted from the end.
        """
        first = jax.eval_shape(lambda: self.empty(0))
        return jax.tree.map(lambda a, s: jnp.squeeze(take(a, i, 1, -1 - s.ndim), -1 - s.ndim), log, first)

    def draft(self, state, b: int, entry=None, count=0):
        """The Draft after the first `count` tokens of a mini-batch of b, whose Entry is `entry`; None where it is 0."""
        return state if entry is None else entry

    def append(self, draft, added, count):
        """The Draft with another token in it, after the first `count` of the mini-batch."""
        return added

    def prepare(self, state):
        """A State as `decode` reads it: what is computed once for all tokens of a mini-batch."""
        return state

    def received(self, T: int, num_parts: int) -> float:
        """Numbers that a device receives in one forward pass, where it has T positions of a sequence and others have
        the rest. Only of mixers without an obstacle to "sequence axis"."""
        raise NotImplementedError

    def obstacle(self, use: str) -> str:
        """Why it cannot serve a use, or "".

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
    """Makes a mixer known as `name`.

    Args:
      name: by which `config.model.mixer` asks for it. A mixer of this directory has the name of the file in which it
        registers itself; another one must be registered before the config is made.
      make: (config.model, rngs) -> Mixer.
      section: dataclass of fields that it alone has, each a `config.fields.field`: `config.model.NAME.FIELD`, which the
        mixer reads as `config.section(NAME)`.
    """
    _MIXERS[name] = make
    if name not in MIXERS:
        MIXERS.append(name)
    if section:
        MIXER_SECTIONS[name] = section


def make_mixer(name: str, config, rngs: nnx.Rngs) -> Mixer:
    """A mixer with fresh parameters."""
    if name not in _MIXERS:
        importlib.import_module(f"ttt_e2e.model.mixers.{name}")
    return _MIXERS[name](config, rngs)
