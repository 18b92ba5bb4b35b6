"""One block of the Transformer. Shapes: `T` positions, `b` inner mini-batch, `D` model width."""

import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.mixers import Context, Mixer, make_mixer
from ttt_e2e.model.mlp import SwiGLU
from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import FastParam
from ttt_e2e.model.passes import Pass


class Block(nnx.Module):
    """Runs a mixer, then in a suffix block the fast MLP, then the slow MLP: each `x += post_norm(f(pre_norm(x)))`.

    Without `config.post_norm` there is no post-norm.
    """

    def __init__(self, config, rngs: nnx.Rngs, *, mixer: str, fast: bool, segment: int = 0):
        """Makes a block.

        Args:
          config: the model's.
          rngs: for the initial weights.
          mixer: name of its kind (mixers/base.py).
          fast: whether the block has a fast MLP.
          segment: number of its segment (stacks.py) in the prefix, or in the suffix.
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
        self.kind, self.label = mixer, mixer_layer.label
        self.fast, self.segment, self.post_norm = fast, segment, config.post_norm

    @property
    def mixer(self) -> Mixer:
        """The block's sequence mixer."""
        return getattr(self, self.label)

    def whole(self, x_TD, compute: Pass, context: Context):
        """Maps the hidden states [T, D] of a whole sequence to those after the block, [T, D]."""
        return self._run(x_TD, compute, lambda x_TD: (self.mixer.whole(x_TD, compute, context), None))[0]

    def extend(self, x_bD, compute: Pass, state, context: Context):
        """Runs a mini-batch that follows the mixer's State: returns (hidden states [b, D], the mixer's Entry)."""
        return self._run(x_bD, compute, lambda x_bD: self.mixer.extend(x_bD, compute, state, context))

    def decode(self, x_1D, compute: Pass, prepared, draft, context: Context):
        """Runs the next token of an unfinished mini-batch.

        Returns (hidden state [1, D], what `Mixer.append` is to add to the Draft).
        """
        return self._run(x_1D, compute, lambda x_1D: self.mixer.decode(x_1D, compute, prepared, draft, context))

    def _run(self, x_TD, compute: Pass, mix):
        """Runs all layers; mix: normed hidden states -> (the mixer's output, what the block returns besides)."""
        y_TD, output = mix(self._pre_norm(self.label, x_TD, compute))
        x_TD = self._add_to_residual(self.label, x_TD, y_TD, compute)
        for name in ("fast_mlp", "mlp") if self.fast else ("mlp",):
            y_TD = getattr(self, name)(self._pre_norm(name, x_TD, compute), compute)
            x_TD = self._add_to_residual(name, x_TD, y_TD, compute)
        return x_TD, output

    def _pre_norm(self, layer: str, x_TD, compute: Pass):
        return compute.apply(getattr(self, f"{layer}_norm"), x_TD)

    def _add_to_residual(self, layer: str, x_TD, y_TD, compute: Pass):
        if self.post_norm:
            y_TD = compute.apply(getattr(self, f"{layer}_post_norm"), y_TD)
        return compute.apply(jnp.add, x_TD, y_TD)
