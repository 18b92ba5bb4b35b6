"""One block of the Transformer. Shapes: `T` positions, `b` inner mini-batch, `D` model width."""

import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.engram import Engram
from ttt_e2e.model.mixers import Context, Mixer, make_mixer
from ttt_e2e.model.mlp import SwiGLU
from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import FastParam, vector
from ttt_e2e.model.passes import Pass


class Block(nnx.Module):
    """Runs a mixer, then in a suffix block the fast MLP, then the slow MLP: each `x += post_norm(f(pre_norm(x)))`.

    Without `config.post_norm` there is no post-norm. With `config.fast_layer_scale`, the fast MLP's output is
    multiplied by a learned number (as by LayerScale, arXiv 2103.17239, but one for all channels: each of these alone
    would have a gradient of mostly noise, by which Adam does not find that all should grow). Before them, an Engram if
    the block has one: `x += engram(x)`.

    It has those methods of `Mixer` that make and change a State. Without Engram the State is the mixer's; with one,
    State, Entry, Log and Draft are {"engram": that of the Engram, "mixer": that of the mixer}.
    """

    def __init__(self, config, rngs: nnx.Rngs, *, mixer: str, fast: bool, segment: int = 0, engram: int | None = None):
        """Makes a block.

        Args:
          config: the model's.
          rngs: for the initial weights.
          mixer: name of its kind (mixers/base.py).
          fast: whether the block has a fast MLP.
          segment: number of its segment (stacks.py) in the prefix, or in the suffix.
          engram: index of the block in the model, if it has an Engram.
        """
        layers = {}
        mixer_layer = make_mixer(mixer, config, rngs)
        layers[mixer_layer.label] = mixer_layer
        layers["mlp"] = SwiGLU("mlp", config.intermediate_size, config, rngs)
        if fast:
            layers["fast_mlp"] = SwiGLU("fast_mlp", config.fast_intermediate_size, config, rngs, FastParam)
        for name, layer in layers.items():
            setattr(self, name, layer)
            setattr(self, f"{name}_norm", RMSNorm(config.hidden_size, config))
            if config.post_norm:
                setattr(self, f"{name}_post_norm", RMSNorm(config.hidden_size, config))
        scale = config.fast_layer_scale if fast else 0
        self.fast_mlp_scale = vector(jnp.full(1, scale), config) if scale else None
        self.engram = None if engram is None else Engram(config, rngs, block=engram)
        self.kind, self.label = mixer, mixer_layer.label
        self.fast, self.segment, self.post_norm = fast, segment, config.post_norm

    @property
    def mixer(self) -> Mixer:
        """The block's sequence mixer."""
        return getattr(self, self.label)

    @property
    def parts(self) -> dict[str, Mixer]:
        """What carries a State, in the order in which it runs."""
        return {"mixer": self.mixer} if self.engram is None else {"engram": self.engram, "mixer": self.mixer}

    def whole(self, x_TD, compute: Pass, context: Context):
        """Maps the hidden states [T, D] of a whole sequence to those after the block, [T, D]."""
        return self._run(x_TD, compute, lambda part, x_TD: (part.whole(x_TD, compute, context), None))[0]

    def extend(self, x_bD, compute: Pass, state, context: Context):
        """Runs a mini-batch that follows the State: returns (hidden states [b, D], Entry)."""
        return self._run(x_bD, compute, lambda part, x_bD, state: part.extend(x_bD, compute, state, context), state)

    def decode(self, x_1D, compute: Pass, prepared, draft, context: Context):
        """Runs the next token of an unfinished mini-batch.

        Returns (hidden state [1, D], what `append` is to add to the Draft).
        """

        def decode(part, x_1D, prepared, draft):
            return part.decode(x_1D, compute, prepared, draft, context)

        return self._run(x_1D, compute, decode, prepared, draft)

    def empty(self, capacity: int):  # noqa: D102 (see `Mixer`, as for the methods below)
        return self._of_parts(lambda part: part.empty(capacity))

    def capacity(self, seq_len: int) -> int:  # noqa: D102
        return self.mixer.capacity(seq_len)

    def resize(self, state, capacity: int):  # noqa: D102
        return self._of_parts(lambda part, state: part.resize(state, capacity), state)

    def advance(self, state, entry):  # noqa: D102
        return self._of_parts(lambda part, *args: part.advance(*args), state, entry)

    def log(self, first, entries_M):  # noqa: D102
        return self._of_parts(lambda part, *args: part.log(*args), first, entries_M)

    def at(self, log, i, take):  # noqa: D102
        return self._of_parts(lambda part, log: part.at(log, i, take), log)

    def draft(self, state, b: int, entry=None, count=0):  # noqa: D102
        return self._of_parts(lambda part, state, entry: part.draft(state, b, entry, count), state, entry)

    def append(self, draft, added, count):  # noqa: D102
        return self._of_parts(lambda part, *args: part.append(*args, count), draft, added)

    def prepare(self, state):  # noqa: D102
        return self._of_parts(lambda part, state: part.prepare(state), state)

    def flops(self, seq_len: int) -> float:
        """Counts the FLOPs of one forward pass of what is no MLP, per token of a sequence of this length."""
        return sum(part.flops(seq_len) for part in self.parts.values())

    def obstacle(self, use: str) -> str:
        """Says in a clause what cannot serve a use (`Mixer.obstacle`) and why, or returns "" where all can."""
        if self.engram and (obstacle := self.engram.obstacle(use)):
            return f"config.model.engram.blocks is {self.engram.fields.blocks!r}, and Engram {obstacle}"
        obstacle = self.mixer.obstacle(use)
        return obstacle and f"config.model.mixer names {self.kind!r}, which {obstacle}"

    def _of_parts(self, function, *trees):
        """Applies a function (part, its part of each of `trees`) to all that carries a State."""
        if self.engram is None:
            return function(self.mixer, *trees)
        return {name: function(part, *(tree and tree[name] for tree in trees)) for name, part in self.parts.items()}

    def _run(self, x_TD, compute: Pass, run, *trees):
        """Runs all layers; run: (part, hidden states, its part of each of `trees`) -> (its output, its Entry)."""
        if self.engram:
            y_TD, of_engram = run(self.engram, x_TD, *(tree["engram"] for tree in trees))
            x_TD, trees = compute.apply(jnp.add, x_TD, y_TD), [tree["mixer"] for tree in trees]
        y_TD, output = run(self.mixer, self._pre_norm(self.label, x_TD, compute), *trees)
        x_TD = self._add_to_residual(self.label, x_TD, y_TD, compute)
        for name in ("fast_mlp", "mlp") if self.fast else ("mlp",):
            y_TD = getattr(self, name)(self._pre_norm(name, x_TD, compute), compute)
            x_TD = self._add_to_residual(name, x_TD, y_TD, compute)
        return x_TD, {"engram": of_engram, "mixer": output} if self.engram else output

    def _pre_norm(self, layer: str, x_TD, compute: Pass):
        return compute.apply(getattr(self, f"{layer}_norm"), x_TD)

    def _add_to_residual(self, layer: str, x_TD, y_TD, compute: Pass):
        if self.post_norm:
            y_TD = compute.apply(getattr(self, f"{layer}_post_norm"), y_TD)
        if layer == "fast_mlp" and self.fast_mlp_scale is not None:
            scale = self.fast_mlp_scale[...].astype(x_TD.dtype)
            y_TD = compute.apply(lambda y_TD: y_TD * scale, y_TD)
        return compute.apply(jnp.add, x_TD, y_TD)
