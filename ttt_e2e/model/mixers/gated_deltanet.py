"""Gated DeltaNet (arXiv 2412.06464): a memory of keys and values, which decays, and is corrected where it is wrong.

    q, k, v    projections of the hidden states, after a causal convolution and SiLU; in each head q and k are divided
               by their norm, and q by the root of the head width
    beta       sigmoid of a projection, how much of an error is corrected, one number for each head
    decay      exp(-exp(A_log) softplus(projection + bias)), one number for each head
    o          what the memory has for q (kernels/delta_rule); then RMSNorm in each head, times silu(gate), and the
               output projection

Shapes: `T` positions, `b` inner mini-batch, `D` model width, `N` heads, `K` width of keys, `V` width of values, `W`
width of the convolution.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.config.fields import field, require
from ttt_e2e.kernels.delta_rule import delta_rule
from ttt_e2e.model.causal_conv import causal_conv, conv_init, last_inputs
from ttt_e2e.model.decay import decay_parameters, log_decay
from ttt_e2e.model.mixers.base import Context, Mixer, register
from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import at_least_float32, matrix, parameter
from ttt_e2e.model.parts import copy_to_all
from ttt_e2e.model.passes import Pass

L2_EPS = 1e-6  # added to the squared norm of q and k
NORM_EPS = 1e-5  # of the norm of each head's output, as released


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Gated DeltaNet: `config.model.gated_deltanet`."""

    num_heads: int = field(0, "heads; 0 = as many as make keys three quarters as wide as `hidden_size`.", least=0)
    head_dim: int = field(256, "width of a key in a head.", least=1)
    expand_v: float = field(2.0, "width of a value in a head, in units of `head_dim`.", above=0)
    conv_width: int = field(4, "positions that the causal convolutions see.", least=1)
    chunk_size: int = field(
        64, "tokens of a chunk, which is computed by matrix products. It changes rounding only.", least=1
    )


class State(NamedTuple):
    """What a sequence has read."""

    memory: jax.Array  # [N, K, V], float32 or wider
    q: jax.Array  # [W - 1, N K], the last inputs of the convolution
    k: jax.Array  # [W - 1, N K], likewise
    v: jax.Array  # [W - 1, N V], likewise


class GatedDeltaNet(Mixer):
    """The mixer of Gated DeltaNet."""

    label = "gated_deltanet"

    def __init__(self, config, rngs: nnx.Rngs):
        fields, D = config.section("gated_deltanet"), config.hidden_size
        K, V = fields.head_dim, round(fields.expand_v * fields.head_dim)
        N, rest = (fields.num_heads, 0) if fields.num_heads else divmod(3 * D, 4 * K)
        legal = f"a divisor of three quarters of hidden_size {D}, unless num_heads is set"
        require(N > 0 and not rest, "config.model.gated_deltanet.head_dim", K, legal)
        require(V > 0, "config.model.gated_deltanet.expand_v", fields.expand_v, f"at least {1 / K:.4g}")
        W = fields.conv_width
        for name, width in (("q", N * K), ("k", N * K), ("v", N * V)):
            setattr(self, f"w{name}", matrix(rngs, (D, width), config, ("width", "heads")))
            setattr(self, f"conv_{name}", parameter(conv_init(rngs, (width, W), W), config, ("heads", None)))
        self.wa = matrix(rngs, (D, N), config, ("width", "heads"))
        self.wb = matrix(rngs, (D, N), config, ("width", "heads"))
        self.wg = matrix(rngs, (D, N * V), config, ("width", "heads"))
        self.dt_bias, self.A_log = decay_parameters(rngs, N, config, least_rate=1e-4)
        self.norm = RMSNorm(V, config, "head_width")
        self.norm.eps = NORM_EPS
        self.wo = matrix(rngs, (N * V, D), config, ("heads", "width"))
        self.config, self.fields, self.num_heads, self.key_width, self.value_width = config, fields, N, K, V

    def whole(self, x_TD, compute: Pass, context: Context):  # noqa: D102 (see `Mixer`)
        return self.extend(x_TD, compute, self.empty(0), context)[0]

    def extend(self, x_bD, compute: Pass, state: State, context: Context):  # noqa: D102
        x_bD = copy_to_all(x_bD, self.is_divided)
        weights = {name: getattr(self, f"w{name}")[...] for name in "qkvabg"}
        projected = {name: compute.product(f"gated_deltanet.{name}", x_bD, w) for name, w in weights.items()}
        y_b, entry = compute.call(lambda *arrays: self._mix(*arrays, count=context.count), projected, state)
        return compute.product("gated_deltanet.o", y_b, self.wo[...], divided=self.is_divided), entry

    def decode(self, x_1D, compute: Pass, prepared: State, draft: State, context: Context):  # noqa: D102
        return self.extend(x_1D, compute, draft, Context())

    def empty(self, capacity: int) -> State:  # noqa: D102
        K, V, before, dtype = self.key_width, self.value_width, self.fields.conv_width - 1, self.config.compute_dtype
        N = self.wo.get_value().shape[-2] // V  # fewer heads where the matrices are one device's part
        memory = jnp.zeros((N, K, V), at_least_float32(jnp.dtype(dtype)))
        return State(memory, *(jnp.zeros((before, N * width), dtype) for width in (K, K, V)))

    def flops(self, seq_len: int) -> float:  # noqa: D102
        D, N, K, V = self.config.hidden_size, self.num_heads, self.key_width, self.value_width
        projections = 2 * D * N * (2 * K + 3 * V + 2) + 2 * self.fields.conv_width * N * (2 * K + V)
        seen = (min(self.fields.chunk_size, seq_len) + 1) / 2  # tokens of its chunk that a token sees, on average
        # Two products with keys; the solution for values and keys, the sum of values; three products with the state.
        return projections + 2 * N * (seen * (2 * K + (K + V) + V) + 3 * K * V)

    def _mix(self, projected: dict, state: State, *, count):
        """Runs all but the projections: returns (y [T, N V], the State after it)."""
        T, dtype, wide = len(projected["q"]), projected["q"].dtype, state.memory.dtype
        before = {"q": state.q, "k": state.k, "v": state.v}
        q_NTK, k_NTK, v_NTV = (
            self._heads(jax.nn.silu(causal_conv(projected[name], getattr(self, f"conv_{name}")[...], inputs)))
            for name, inputs in before.items()
        )
        q_NTK, k_NTK = (_normed(a.astype(wide)) for a in (q_NTK, k_NTK))
        q_NTK *= self.key_width**-0.5
        beta_NT = jax.nn.sigmoid(projected["b"].T.astype(wide))
        if count is not None:  # padding corrects nothing
            beta_NT = jnp.where(jnp.arange(T) < count, beta_NT, 0)
        _, log_decay_TN = log_decay(projected["a"], self.dt_bias[...], self.A_log[...], wide, count)
        o_NTV, memory = delta_rule(
            *(a.astype(dtype) for a in (q_NTK, k_NTK, v_NTV)),
            beta_NT,
            log_decay_TN.T,
            state.memory,
            chunk_size=self.fields.chunk_size,
        )

        @partial(jax.checkpoint, prevent_cse=False)  # it costs little, and would leave several float32 residuals
        def gated(o_NTV, g_T):
            o_NTV = self.norm(o_NTV) * jax.nn.silu(self._heads(g_T).astype(wide))
            return o_NTV.swapaxes(0, 1).reshape(T, -1).astype(dtype)

        after = {name: last_inputs(projected[name], inputs, count) for name, inputs in before.items()}
        return gated(o_NTV, projected["g"]), State(memory, **after)

    def _heads(self, x_T):
        """Splits [T, N X] into heads [N, T, X]."""
        N = self.wo.get_value().shape[-2] // self.value_width
        return x_T.reshape(len(x_T), N, -1).swapaxes(0, 1)

    @property
    def is_divided(self) -> bool:
        """Whether the matrices hold only one device's heads (tensor parallelism, parts.py)."""
        return self.wo.get_value().shape[-2] < self.num_heads * self.value_width


def _normed(x):
    """Divides by the norm of the last axis."""
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + L2_EPS)


register("gated_deltanet", GatedDeltaNet, GatedDeltaNetConfig)
