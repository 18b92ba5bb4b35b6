"""Test-time training with key-value binding (TTT-KVB): a memory that learns keys' values chunk by chunk.

The layer of LaCT (arXiv 2505.23884) as released for language models, without the window attention that shares its
queries, keys and values there: in a pattern such as "window,ttt_kvb" that is a layer of its own, as in TTT-E2E
(arXiv 2512.23675). What the memory of a head is, and how it learns, is in kernels/key_value_binding/. Around it:

    q, k, v    silu of projections; q and k are scaled and shifted by channel before. After, they are rotated (RoPE) at
               absolute positions, in groups of channels as wide as a head of attention, and divided by their norm in
               each head
    rates      softplus(projection + bias), one for each token, head and matrix, about 0.001 initially
    momentum   sigmoid(projection + bias), one for each token and head
    output     RMSNorm in each head, times silu(projection + bias), one for each token and head; output projection

The first matrices of a head are parameters: w1, and w0 and w2 as I / 2 plus a product of low rank. Weight decay applies
to all parameters, as in the release.

The State is that of kernels/key_value_binding/: what the memory has learned, and gradients of an unfinished chunk.

Shapes: `T` positions, `b` inner mini-batch, `D` model width, `N` heads of the memory, `H` head width, `A` heads of
attention; `C` controls of a head: its rates, output scale and momentum.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.config.fields import field, require
from ttt_e2e.kernels import key_value_binding
from ttt_e2e.kernels.key_value_binding import State, Tokens, Weights
from ttt_e2e.model.mixers.base import Context, Mixer, register
from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import at_least_float32, matrix, parameter
from ttt_e2e.model.parts import copy_to_all
from ttt_e2e.model.passes import Pass
from ttt_e2e.model.rope import absolute_angles, rotate_by

BASE_RATE = 0.001  # a rate where projection and bias are 0
LOW_RANK_GAIN = 0.5  # of the two factors, relative to the standard deviations that keep a vector's norm
OUTPUT_NORM_EPS = 1e-5  # as released: initial outputs are about as small as its root


@dataclass(frozen=True)
class TTTKVBConfig:
    """Test-time training with key-value binding: `config.model.ttt_kvb`.

    Its heads are parts of `hidden_size`, whose channels rotate in groups of `head_dim`.
    """

    num_heads: int = field(4, "heads of the memory. Must divide `hidden_size` into multiples of `head_dim`.", least=1)
    low_rank: int = field(
        32, "rank in which two of the three first matrices of a head's memory differ from I / 2.", least=1
    )
    chunk_size: int = field(
        1024,
        "tokens that the memory learns at once; they do not see each other in it. Reading is fast if "
        "`inner.mini_batch_size` divides it or is a multiple of it.",
        least=1,
    )
    momentum: bool = field(True, "a part of each update of the memory, which the tokens choose, is added to the next.")


class KeyValueBinding(Mixer):
    """A memory of several heads, each a small SwiGLU network that learns while it reads."""

    label = "ttt_kvb"

    def __init__(self, config, rngs: nnx.Rngs):
        fields = config.section("ttt_kvb")
        D, N, rank = config.hidden_size, fields.num_heads, fields.low_rank
        H = D // N
        require(
            D % (N * config.head_dim) == 0,
            "config.model.ttt_kvb.num_heads",
            N,
            f"a number that divides hidden_size {D} into multiples of head_dim {config.head_dim}",
        )
        self.wq = matrix(rngs, (D, D), config, ("width", "heads"))
        self.wk = matrix(rngs, (D, D), config, ("width", "heads"))
        self.wv = matrix(rngs, (D, D), config, ("width", "heads"))
        self.qk_scale = parameter(jnp.ones((2, D)), config, (None, "heads"), is_cast=False)
        self.qk_offset = parameter(jnp.zeros((2, D)), config, (None, "heads"), is_cast=False)
        self.controls = matrix(rngs, (D, N * (4 + fields.momentum)), config, ("width", "heads"))
        self.control_bias = parameter(jnp.zeros(N * (4 + fields.momentum)), config, ("heads",))

        def first(*shape, gain=1.0):
            """A matrix [in, out] for each head that keeps a vector's norm, times a gain; divided over `data`, too."""
            value = jax.random.normal(rngs.params(), (N, *shape)) * (gain * shape[0] ** -0.5)
            return parameter(value, config, ("heads", "width", None), is_cast=False)

        self.w0_in, self.w0_out = first(H, rank, gain=LOW_RANK_GAIN), first(rank, H, gain=LOW_RANK_GAIN)
        self.w2_in, self.w2_out = first(H, rank, gain=LOW_RANK_GAIN), first(rank, H, gain=LOW_RANK_GAIN)
        self.w1 = first(H, H)
        self.norm = RMSNorm(H, config, "head_width")
        self.norm.eps = OUTPUT_NORM_EPS
        self.wo = matrix(rngs, (D, D), config, ("heads", "width"))
        self.config, self.fields, self.num_heads = config, fields, N

    def whole(self, x_TD, compute: Pass, context: Context):  # noqa: D102 (see `Mixer`)
        def run(projected):
            tokens, scale_NT = self._tokens(projected, jnp.arange(x_TD.shape[-2]))
            y_NTH = key_value_binding.whole(self._first(), tokens, self.fields.chunk_size)
            return self._scaled(y_NTH, scale_NT), None

        return self._output(compute.call(run, self._project(x_TD, compute))[0], compute)

    def extend(self, x_bD, compute: Pass, state: State, context: Context):  # noqa: D102
        def run(projected, state):
            tokens, scale_NT = self._tokens(projected, context.start + jnp.arange(x_bD.shape[-2]))
            y_NTH, state = key_value_binding.extend(
                self._first(), state, tokens, self.fields.chunk_size, start=context.start, count=context.count
            )
            return self._scaled(y_NTH, scale_NT), state

        y_T, entry = compute.call(run, self._project(x_bD, compute), state)
        return self._output(y_T, compute), entry

    def decode(self, x_1D, compute: Pass, prepared: State, draft: State, context: Context):  # noqa: D102
        return self.extend(x_1D, compute, draft, Context(start=context.start + context.count))

    def empty(self, capacity: int) -> State:  # noqa: D102
        *_, N, H, _ = self.w1.get_value().shape  # fewer heads where the matrices are one device's part
        shape = jax.ShapeDtypeStruct((N, H, H), self._dtype)
        return key_value_binding.empty(Weights(*[shape] * 3), momentum=self.fields.momentum, dtype=self._dtype)

    def flops(self, seq_len: int) -> float:  # noqa: D102
        D, N, chunk = self.config.hidden_size, self.num_heads, self.fields.chunk_size
        learned = (seq_len - 1) // chunk * chunk / seq_len  # the last chunk is not
        return 8 * D**2 + 2 * D * self.control_bias.get_value().shape[-1] + (6 + 12 * learned) * D**2 / N

    def _project(self, x_TD, compute: Pass) -> tuple:
        """Projects to queries, keys and values [T, N H], and controls [T, N C]."""
        x_TD = copy_to_all(x_TD, self.is_divided)
        weights = {"q": self.wq, "k": self.wk, "v": self.wv, "controls": self.controls}
        return tuple(compute.product(f"ttt_kvb.{name}", x_TD, w[...]) for name, w in weights.items())

    def _output(self, y_T, compute: Pass):
        return compute.product("ttt_kvb.o", y_T, self.wo[...], divided=self.is_divided)

    def _tokens(self, projected, positions_T):
        """Makes what the memory reads and learns of projections: returns (Tokens, output scale [N, T])."""
        angles = absolute_angles(positions_T, self.config.head_dim, theta=self.config.rope_theta, dtype=self._dtype)

        @partial(jax.checkpoint, prevent_cse=False)  # it costs little, and would leave many float32 residuals
        def make(q_T, k_T, v_T, controls_T):
            q_NTH, k_NTH = (
                self._directions(x_T * scale + offset, angles).astype(x_T.dtype)
                for x_T, scale, offset in zip((q_T, k_T), self.qk_scale[...], self.qk_offset[...], strict=True)
            )
            v_NTH = self._heads(jax.nn.silu(v_T))
            controls = self._heads((controls_T + self.control_bias[...]).astype(self._dtype))
            *rates, scale_NT = jnp.moveaxis(controls[..., :4], -1, 0)
            rates = Weights(*(jax.nn.softplus(rate_NT + math.log(math.expm1(BASE_RATE))) for rate_NT in rates))
            momentum_NT = jax.nn.sigmoid(controls[..., 4]) if self.fields.momentum else None
            return Tokens(q_NTH, k_NTH, v_NTH, rates, momentum_NT), jax.nn.silu(scale_NT)

        return make(*projected)

    def _directions(self, x_T, angles_TC):
        """Computes queries or keys [N, T, H] of norm 1."""
        x_T = jax.nn.silu(x_T.astype(self._dtype))
        x_ATH = x_T.reshape(len(x_T), -1, self.config.head_dim).swapaxes(0, 1)
        x_ATH = rotate_by(x_ATH, angles_TC, style=self.config.rope_style)
        return key_value_binding.normed(self._heads(x_ATH.swapaxes(0, 1).reshape(x_T.shape)), axis=-1)

    def _heads(self, x_T):
        """Splits [T, N X] into heads [N, T, X]."""
        N = self.w1.get_value().shape[0]
        return x_T.reshape(len(x_T), N, -1).swapaxes(0, 1)

    def _first(self) -> Weights:
        """Makes the matrices that every sequence begins with."""
        w0_in, w0_out, w1, w2_in, w2_out = (
            w[...].astype(self._dtype) for w in (self.w0_in, self.w0_out, self.w1, self.w2_in, self.w2_out)
        )
        half = jnp.eye(w1.shape[-1], dtype=self._dtype) / 2
        return Weights(half + w0_in @ w0_out, w1, half + w2_in @ w2_out)

    def _scaled(self, y_NTH, scale_NT):
        """Norms what the heads read, scales it, and joins the heads: [T, N H] in the compute dtype."""
        y_NTH = self.norm(y_NTH) * scale_NT[..., None]
        y_TNH = y_NTH.swapaxes(0, 1)
        return y_TNH.reshape(len(y_TNH), -1).astype(jnp.dtype(self.config.compute_dtype))

    @property
    def is_divided(self) -> bool:
        """Whether the matrices hold only one device's heads (tensor parallelism, parts.py)."""
        return self.wo.get_value().shape[-2] < self.config.hidden_size

    @property
    def _dtype(self):
        """The dtype of the memory, its rates, and norms: float32 or wider."""
        return at_least_float32(jnp.dtype(self.config.compute_dtype))


register("ttt_kvb", KeyValueBinding, TTTKVBConfig)
