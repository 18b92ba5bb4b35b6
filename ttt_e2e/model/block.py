"""One block of the Transformer. Shapes: `T` positions, `D` model width."""

import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.attention import Attention
from ttt_e2e.model.mlp import SwiGLU
from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import FastParam
from ttt_e2e.model.passes import Pass


class Block(nnx.Module):
    """Attention, then in a suffix block the fast MLP, then the slow MLP: each `x += post_norm(f(pre_norm(x)))`."""

    def __init__(self, config, rngs: nnx.Rngs, *, fast: bool):
        D = config.hidden_size
        self.attention = Attention(config, rngs)
        self.attention_norm = RMSNorm(D, config)
        self.mlp = SwiGLU(config.intermediate_size, config, rngs)
        self.mlp_norm = RMSNorm(D, config)
        if fast:
            self.fast_mlp = SwiGLU(config.fast_intermediate_size, config, rngs, FastParam)
            self.fast_mlp_norm = RMSNorm(D, config)
        if config.post_norm:
            self.attention_post_norm = RMSNorm(D, config)
            self.mlp_post_norm = RMSNorm(D, config)
            if fast:
                self.fast_mlp_post_norm = RMSNorm(D, config)
        self.fast, self.post_norm = fast, config.post_norm

    def __call__(self, x_TD, compute: Pass, *, decode: bool = False, **context):
        """Hidden states [T, D] to hidden states [T, D] and the new keys and values [T, G, H].

        `context` is as of `Attention`: of its `decode`, or of its `__call__`.
        """
        lift = compute.lift
        attend = self.attention.decode if decode else self.attention
        y_TD, new = attend(lift(self.attention_norm, x_TD), compute, **context)
        x_TD = lift(jnp.add, x_TD, lift(self.attention_post_norm, y_TD) if self.post_norm else y_TD)
        if self.fast:
            y_TD = self.fast_mlp(lift(self.fast_mlp_norm, x_TD), compute)
            x_TD = lift(jnp.add, x_TD, lift(self.fast_mlp_post_norm, y_TD) if self.post_norm else y_TD)
        y_TD = self.mlp(lift(self.mlp_norm, x_TD), compute)
        return lift(jnp.add, x_TD, lift(self.mlp_post_norm, y_TD) if self.post_norm else y_TD), new
