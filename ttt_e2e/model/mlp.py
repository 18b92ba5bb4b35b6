"""The feed-forward network. Shapes: `T` positions, `D` model width, `F` MLP width."""

from functools import partial

import jax
from flax import nnx

from ttt_e2e.model.parameters import Directed, matrix
from ttt_e2e.model.parts import copy_to_all
from ttt_e2e.model.passes import Pass


class SwiGLU(nnx.Module):
    """w2(silu(w1 x) * w3 x). With `kind=FastParam` its three matrices are fast weights."""

    def __init__(self, name: str, width: int, config, rngs: nnx.Rngs, kind: type[nnx.Param] = nnx.Param):
        """name: tells its results from those of other networks of a block (passes.py)."""
        D = config.hidden_size
        self.w1 = matrix(rngs, (D, width), config, ("width", "mlp"), kind)
        self.w2 = matrix(rngs, (width, D), config, ("mlp", "width"), kind)
        self.w3 = matrix(rngs, (D, width), config, ("width", "mlp"), kind)
        self.name, self.width = name, width

    def __call__(self, x_TD, compute: Pass):
        """[T, D] to [T, D]; the products are computed in the dtype of `x_TD`.

        The matrices may be one device's part of the width (parts.py).
        """
        x_TD = copy_to_all(x_TD, self.is_divided)
        gate_TF, up_TF = (compute.product(f"{self.name}.{w}", x_TD, getattr(self, w).get_value()) for w in ("w1", "w3"))
        gated_TF = compute.apply(_gated, gate_TF, up_TF)
        return compute.product(f"{self.name}.w2", gated_TF, self.w2.get_value(), divided=self.is_divided)

    @property
    def is_divided(self) -> bool:
        """Whether the matrices at hand are one device's part of the width."""
        w2 = self.w2.get_value()
        return (w2.weight if isinstance(w2, Directed) else w2).shape[-2] < self.width


@partial(jax.checkpoint, prevent_cse=False)
def _gated(gate_TF, up_TF):
    """silu(gate) * up. Rematerialised: in a dual pass it would leave about ten residuals, and costs little."""
    return jax.nn.silu(gate_TF) * up_TF
