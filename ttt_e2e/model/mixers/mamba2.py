"""Mamba-2 (arXiv 2405.21060): a recurrence whose state, a matrix for each head, decays by one number a token.

    z, x, B, C, dt    projections of the hidden states; x, B and C then pass a causal convolution, and SiLU
    dt                softplus(dt + bias), the step of each head; its decay is exp(-exp(A_log) dt)
    S                 S decay + dt x B^T         (kernels/ssd)
    y                 S C + skip x; then RMSNorm(y * silu(z)) over all heads, and the output projection

B and C serve all heads (one group). The original has one matrix for all projections, and one convolution; here each has
its own, so that heads can be divided among devices.

Shapes: `T` positions, `b` inner mini-batch, `D` model width, `I` = N H inner width, `N` heads, `H` head width, `S`
state width, `W` width of the convolution.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.config.fields import field, require
from ttt_e2e.kernels.ssd import ssd
from ttt_e2e.model.causal_conv import causal_conv, conv_init, last_inputs
from ttt_e2e.model.decay import decay_parameters, log_decay
from ttt_e2e.model.mixers.base import Context, Mixer, register
from ttt_e2e.model.parameters import at_least_float32, matrix, parameter, vector
from ttt_e2e.model.parts import copy_to_all, sum_to_all
from ttt_e2e.model.passes import Pass

NORM_EPS = 1e-5  # of the gated norm, as released


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2: `config.model.mamba2`."""

    state_size: int = field(128, "width of a head's state, which is a matrix of `head_dim` by this.", least=1)
    head_dim: int = field(64, "width of a head. Must divide the inner width, `expand * hidden_size`.", least=1)
    expand: int = field(2, "inner width, in units of `hidden_size`.", least=1)
    conv_width: int = field(4, "positions that the causal convolution sees.", least=1)
    chunk_size: int = field(
        256, "tokens of a chunk, which is computed by matrix products. It changes rounding only.", least=1
    )


class State(NamedTuple):
    """What a sequence has read."""

    ssm: jax.Array  # [N, H, S], float32 or wider
    x: jax.Array  # [W - 1, I], the last inputs of the convolution
    bc: jax.Array  # [W - 1, 2 S], likewise


class Mamba2(Mixer):
    """The mixer of Mamba-2."""

    label = "mamba2"

    def __init__(self, config, rngs: nnx.Rngs):
        fields = config.section("mamba2")
        D, S, W = config.hidden_size, fields.state_size, fields.conv_width
        inner = fields.expand * D
        N, rest = divmod(inner, fields.head_dim)
        legal = f"a divisor of the inner width {inner} (expand * hidden_size)"
        require(not rest, "config.model.mamba2.head_dim", fields.head_dim, legal)
        self.wz = matrix(rngs, (D, inner), config, ("width", "heads"))
        self.wx = matrix(rngs, (D, inner), config, ("width", "heads"))
        self.wbc = matrix(rngs, (D, 2 * S), config, ("width", None))
        self.wdt = matrix(rngs, (D, N), config, ("width", "heads"))
        self.conv_x = parameter(conv_init(rngs, (inner, W), W), config, ("heads", None))
        self.conv_x_bias = vector(conv_init(rngs, (inner,), W), config, "heads")
        self.conv_bc = parameter(conv_init(rngs, (2 * S, W), W), config, (None, None))
        self.conv_bc_bias = vector(conv_init(rngs, (2 * S,), W), config)
        self.dt_bias, self.A_log = decay_parameters(rngs, N, config, least_rate=1.0)
        self.skip = vector(jnp.ones(N), config, "heads", decays=False)
        self.norm_weight = vector(jnp.ones(inner), config, "heads")
        self.wo = matrix(rngs, (inner, D), config, ("heads", "width"))
        self.config, self.fields, self.num_heads, self.inner_width = config, fields, N, inner

    def whole(self, x_TD, compute: Pass, context: Context):  # noqa: D102 (see `Mixer`)
        return self.extend(x_TD, compute, self.empty(0), context)[0]

    def extend(self, x_bD, compute: Pass, state: State, context: Context):  # noqa: D102
        own_bD = copy_to_all(x_bD, self.is_divided)
        products = {"z": (own_bD, self.wz), "x": (own_bD, self.wx), "bc": (x_bD, self.wbc), "dt": (own_bD, self.wdt)}
        projected = {name: compute.product(f"mamba2.{name}", x, w[...]) for name, (x, w) in products.items()}
        y_bI, entry = compute.call(lambda *arrays: self._mix(*arrays, count=context.count), projected, state)
        return compute.product("mamba2.o", y_bI, self.wo[...], divided=self.is_divided), entry

    def decode(self, x_1D, compute: Pass, prepared: State, draft: State, context: Context):  # noqa: D102
        return self.extend(x_1D, compute, draft, Context())

    def empty(self, capacity: int) -> State:  # noqa: D102
        fields, dtype = self.fields, jnp.dtype(self.config.compute_dtype)
        inner = self.wo.get_value().shape[-2]  # fewer heads where the matrices are one device's part
        return State(
            jnp.zeros((inner // fields.head_dim, fields.head_dim, fields.state_size), at_least_float32(dtype)),
            jnp.zeros((fields.conv_width - 1, inner), dtype),
            jnp.zeros((fields.conv_width - 1, 2 * fields.state_size), dtype),
        )

    def flops(self, seq_len: int) -> float:  # noqa: D102
        D, S, inner, W = self.config.hidden_size, self.fields.state_size, self.inner_width, self.fields.conv_width
        projections = 2 * D * (3 * inner + 2 * S + self.num_heads) + 2 * W * (inner + 2 * S)
        seen = (min(self.fields.chunk_size, seq_len) + 1) / 2  # tokens of its chunk that a token sees, on average
        return projections + 2 * seen * (S + inner) + 4 * inner * S

    def _mix(self, projected: dict, state: State, *, count):
        """Runs all but the projections: returns (y [T, I], the State after it)."""
        z_TI, x_TI, bc_TS2, dt_TN = (projected[name] for name in ("z", "x", "bc", "dt"))
        T, dtype, wide = len(x_TI), x_TI.dtype, state.ssm.dtype
        after_x, after_bc = last_inputs(x_TI, state.x, count), last_inputs(bc_TS2, state.bc, count)
        x_TI = jax.nn.silu(causal_conv(x_TI, self.conv_x[...], state.x) + self.conv_x_bias[...].astype(dtype))
        bc_TS2 = causal_conv(bc_TS2, self.conv_bc[...], state.bc) + self.conv_bc_bias[...].astype(dtype)
        B_TS, C_TS = jnp.split(copy_to_all(jax.nn.silu(bc_TS2), self.is_divided), 2, axis=-1)

        dt_TN, log_decay_TN = log_decay(dt_TN, self.dt_bias[...], self.A_log[...], wide, count)
        x_NTH = x_TI.reshape(T, -1, self.fields.head_dim).swapaxes(0, 1)
        step_NTH = (x_NTH * dt_TN.T[..., None]).astype(dtype)
        y_NTH, ssm = ssd(step_NTH, log_decay_TN.T, B_TS, C_TS, state.ssm, chunk_size=self.fields.chunk_size)

        @partial(jax.checkpoint, prevent_cse=False)  # it costs little, and would leave several float32 residuals
        def gated(y_NTH, x_NTH, z_TI):
            y_NTH += self.skip[...].astype(wide)[:, None, None] * x_NTH
            y_TI = y_NTH.swapaxes(0, 1).reshape(T, -1) * jax.nn.silu(z_TI.astype(wide))
            return self._normed(y_TI).astype(dtype)

        return gated(y_NTH, x_NTH, z_TI), State(ssm, after_x, after_bc)

    def _normed(self, y_TI):
        """Computes RMSNorm over all heads, also those of other devices."""
        total = copy_to_all(sum_to_all((y_TI * y_TI).sum(-1, keepdims=True), self.is_divided), self.is_divided)
        return y_TI * jax.lax.rsqrt(total / self.inner_width + NORM_EPS) * self.norm_weight[...]

    @property
    def is_divided(self) -> bool:
        """Whether the matrices hold only one device's heads (tensor parallelism, parts.py)."""
        return self.wo.get_value().shape[-2] < self.inner_width


register("mamba2", Mamba2, Mamba2Config)
