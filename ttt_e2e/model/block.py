"""One block of the Transformer. Shapes: `T` positions, `b` inner mini-batch, `D` model width."""

import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.mixers import Context, Mixer, make_mixer
from ttt_e2e.model.mlp import SwiGLU
from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import FastParam
from ttt_e2e.model.passes import Pass


class Block(nnx.Module):
    """A mixer, then in a suffix block the fast MLP, then the slow MLP: each `x += post_norm(f(pre_norm(x)))`."""

    def __init__(self, config, rngs: nnx.Rngs, *, mixer: str, fast: bool):
        """mixer: name of its kind; fast: whether the block has a fast MLP."""
        layers = {}
        mixing = make_mixer(mixer, config, rngs)
        layers[mixing.label] = mixing
        layers["mlp"] = SwiGLU("mlp", config.intermediate_size, config, rngs)
        if fast:
            layers["fast_mlp"] = SwiGLU("fast_mlp", config.fast_intermediate_size, config, rngs, FastParam)
        for name, layer in layers.items():
            setattr(self, name, layer)
            setattr(self, f"{name}_norm", RMSNorm(config.hidden_size, config))
            if config.post_norm:
                setattr(self, f"{name}_post_norm", RMSNorm(config.hidden_size, config))
        self.label, self.fast, self.post_norm = mixing.label, fast, config.post_norm

    @property
    def mixer(self) -> Mixer:
        """The block's sequence mixer."""
        return getattr(self, self.label)

    def whole(self, x_TD, compute: Pass, context: Context):
        """Hidden states [T, D] of a whole sequence to hidden states [T, D]."""
        return self._run(x_TD, compute, lambda x_TD: (self.mixer.whole(x_TD, compute, context), None))[0]

    def extend(self, x_bD, compute: Pass, state, context: Context):
        """(hidden states [b, D], the mixer's Entry) of a mini-batch that follows the mixer's State."""
        return self._run(x_bD, compute, lambda x_bD: self.mixer.extend(x_bD, compute, state, context))

    def decode(self, x_1D, compute: Pass, prepared, draft, context: Context):
        """(hidden state [1, D], what it adds to the mixer's Draft) of the next token of an unfinished mini-batch."""
        return self._run(x_1D, compute, lambda x_1D: self.mixer.decode(x_1D, compute, prepared, draft, context))

    def _run(self, x_TD, compute: Pass, mix):
        y_TD, output = mix(self._before(self.label, x_TD, compute))
        x_TD = self._add(self.label, x_TD, y_TD, compute)
        for name in ("fast_mlp", "mlp") if self.fast else ("mlp",):
            y_TD = getattr(self, name)(self._before(name, x_TD, compute), compute)
            x_TD = self._add(name, x_TD, y_TD, compute)
        return x_TD, output

    def _before(self, layer: str, x_TD, compute: Pass):
        return compute.apply(getattr(self, f"{layer}_norm"), x_TD)

    def _add(self, layer: str, x_TD, y_TD, compute: Pass):
        if self.post_norm:
            y_TD = compute.apply(getattr(self, f"{layer}_post_norm"), y_TD)
        return compute.apply(jnp.add, x_TD, y_TD)
