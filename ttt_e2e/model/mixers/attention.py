"""Attention to all positions before, or (window.py) to a window of the most recent ones.

The State is a KV cache of fixed size, K positions, with the newest last and empty positions at its front. It holds
normed keys that are *not* rotated, and values, heads first, as kernels and decoding read them. RoPE rotates at use, at
positions that count from the beginning of the cache: 0 to K - 1 in the cache, K to K + b - 1 in the mini-batch.
Absolute float32 angles would be wrong by 0.06 rad at position 2M.

Shapes: `T` positions, `b` inner mini-batch, `K` cached positions, `M` mini-batches of a sequence, `D` model width,
`N` query heads, `G` key/value heads, `H` head width.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.kernels.attention.one_query import Keys, attend_one
from ttt_e2e.model import sequence_parts
from ttt_e2e.model.mixers.base import Context, Mixer, register
from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import matrix, vector
from ttt_e2e.model.parts import copy_to_all
from ttt_e2e.model.passes import Pass
from ttt_e2e.model.rope import Scaling, rotate


class KeyValues(NamedTuple):
    """Keys and values [G, positions, H].

    Of K positions: a State, the KV cache. Of b: an Entry, or a Draft (zeros after the last token). Of 1: what a token
    adds to a Draft. Keys are unrotated in States and Entries, rotated in Drafts.
    """

    k: jax.Array
    v: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["stream"], meta_fields=["capacity", "mini_batch_size"])
@dataclass(frozen=True)
class Log:
    """Keys and values of the first cache, then of all mini-batches: the cache before mini-batch i is a slice."""

    stream: KeyValues  # [G, K + M b, H]; the cache before mini-batch i is its positions i b to i b + K - 1
    capacity: int  # K
    mini_batch_size: int  # b


class Attention(Mixer):
    """Grouped-query attention with optional QK-norm, applied before RoPE."""

    label = "attention"

    def __init__(self, config, rngs: nnx.Rngs, *, window: int):
        """window: number of positions that each one attends to, itself included; 0 = all up to itself."""
        D, H = config.hidden_size, config.head_dim
        N, G = config.num_attention_heads, config.num_key_value_heads
        self.wq = matrix(rngs, (D, N * H), config, ("width", "heads"))
        self.wk = matrix(rngs, (D, G * H), config, ("width", "heads"))
        self.wv = matrix(rngs, (D, G * H), config, ("width", "heads"))
        self.wo = matrix(rngs, (N * H, D), config, ("heads", "width"))
        if config.attention_bias:
            for name, heads in (("bq", N), ("bk", G), ("bv", G)):
                setattr(self, name, vector(jnp.zeros(heads * H), config, "heads"))
        if config.qk_norm:
            self.q_norm = RMSNorm(H, config, "head_width")
            self.k_norm = RMSNorm(H, config, "head_width")
        self.config, self.window = config, window
        self.grows, self.num_heads = not window, G

    def whole(self, x_TD, compute: Pass, context: Context):  # noqa: D102 (see `Mixer`)
        q_NTH, k_GTH, v_GTH = self._project(x_TD, compute)
        parts, T = context.parts, x_TD.shape[-2]
        positions_T = parts.positions(T) if parts else jnp.arange(T)
        q_NTH, k_GTH = (self._rotated(a, positions_T) for a in (q_NTH, k_GTH))
        attention = partial(compute.attention, "attention", backend=self.config.attention_backend)
        attend = partial(parts.attend, attention) if parts else partial(attention, num_empty=0)
        return self._output(attend(q_NTH, k_GTH, v_GTH, window=self.window), compute)

    def extend(self, x_bD, compute: Pass, state: KeyValues, context: Context):  # noqa: D102
        q_NbH, k_GbH, v_GbH = self._project(x_bD, compute)
        entry = KeyValues(compute.value(k_GbH), compute.value(v_GbH))
        return self._output(self._attend(q_NbH, k_GbH, v_GbH, compute, state, context), compute), entry

    def decode(self, x_1D, compute: Pass, prepared: KeyValues, draft: KeyValues, context: Context):
        """Runs one token, as `Mixer.decode`. Reads the KV cache in place: copies no key, rotates only the new one."""
        out_NH, _, added = self._attend_one(*self._project(x_1D, compute), prepared, draft, context)
        return self._output(out_NH[:, None], compute), added

    def empty(self, capacity: int) -> KeyValues:  # noqa: D102
        H = self.config.head_dim
        heads = self.wk.get_value().shape[-1] // H  # fewer than G where the matrices are one device's part
        zeros = jnp.zeros((heads, capacity, H), jnp.dtype(self.config.compute_dtype))
        return KeyValues(zeros, zeros)

    def capacity(self, seq_len: int) -> int:  # noqa: D102
        return min(self.window, seq_len) if self.window else seq_len

    def resize(self, state: KeyValues, capacity: int) -> KeyValues:
        """Adds empty positions at the front of the cache, or drops the oldest ones. The newest position stays last."""
        lacking = capacity - state.k.shape[-2]

        def at_the_front(a):
            front = [(0, 0)] * (a.ndim - 2) + [(max(lacking, 0), 0), (0, 0)]
            return jnp.pad(a, front)[..., max(-lacking, 0) :, :]

        return jax.tree.map(at_the_front, state)

    def advance(self, state: KeyValues, entry: KeyValues) -> KeyValues:
        """Appends the mini-batch and drops as many of the oldest positions. The cache keeps its size."""

        def most_recent(old, new):
            both = jnp.concatenate([old, new], axis=1)
            return jax.lax.slice_in_dim(both, new.shape[1], both.shape[1], axis=1)

        return jax.tree.map(most_recent, state, entry)

    def log(self, first: KeyValues, entries_M: KeyValues) -> Log:  # noqa: D102
        M, G, b, H = entries_M.k.shape
        entries = jax.tree.map(lambda e: jnp.moveaxis(e, 0, 1).reshape(G, M * b, H), entries_M)
        stream = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), first, entries)
        return Log(stream, capacity=first.k.shape[1], mini_batch_size=b)

    def at(self, log: Log, i, take) -> KeyValues:  # noqa: D102
        return jax.tree.map(lambda a: take(a, i * log.mini_batch_size, log.capacity, -2), log.stream)

    def draft(self, state: KeyValues, b: int, entry: KeyValues | None = None, count=0) -> KeyValues:  # noqa: D102
        G, K, H = state.k.shape
        if entry is None:
            return jax.tree.map(lambda a: jnp.zeros((G, b, H), a.dtype), state)
        rotated = entry._replace(k=self._rotated(entry.k, K + jnp.arange(b)))
        return jax.tree.map(lambda a: jnp.where((jnp.arange(b) < count)[:, None], a, 0), rotated)

    def append(self, draft: KeyValues, added: KeyValues, count) -> KeyValues:  # noqa: D102
        return jax.tree.map(lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, count, 1), draft, added)

    def prepare(self, state: KeyValues) -> KeyValues:
        """Rotates the cached keys at their positions in the cache, once for all tokens of a mini-batch."""
        return state._replace(k=self._rotated(state.k, jnp.arange(state.k.shape[1])))

    def flops(self, seq_len: int) -> float:  # noqa: D102
        config, k = self.config, self.window
        N, G, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        keys = (seq_len + 1) / 2 if not k or k >= seq_len else k - k * (k - 1) / (2 * seq_len)  # a query's average
        return 4 * config.hidden_size * H * (N + G) + 4 * N * H * keys

    def received(self, T: int, num_parts: int) -> float:  # noqa: D102
        config = self.config
        heads = config.num_attention_heads, config.num_key_value_heads
        return config.head_dim * sequence_parts.received_positions(self.window, T, *heads, num_parts)

    def obstacle(self, use: str) -> str:  # noqa: D102
        return "" if use == "sequence axis" else super().obstacle(use)

    def _project(self, x_TD, compute: Pass):
        """Projects to queries [N, T, H], keys and values [G, T, H]: after QK-norm, before RoPE."""
        x_TD = copy_to_all(x_TD, self.is_divided)
        weights = {"attention.q": self.wq, "attention.k": self.wk, "attention.v": self.wv}
        projected = [compute.product(name, x_TD, w[...]) for name, w in weights.items()]
        if self.config.attention_bias:
            biases = (b[...].astype(x_TD.dtype) for b in (self.bq, self.bk, self.bv))
            projected = [compute.apply(lambda y, b=b: y + b, y) for y, b in zip(projected, biases)]
        q_NTH, k_GTH, v_GTH = map(self._heads, projected)
        if self.config.qk_norm:
            q_NTH, k_GTH = compute.apply(self.q_norm, q_NTH), compute.apply(self.k_norm, k_GTH)
        return q_NTH, k_GTH, v_GTH

    def _attend(self, q_NbH, k_GbH, v_GbH, compute: Pass, state: KeyValues, context: Context, **options):
        """Attends to the cached positions and the new ones, unrotated; options and result as of `Pass.attention`."""
        K, b = state.k.shape[1], q_NbH.shape[-2]
        q_NbH, k_GbH = (self._rotated(a, K + jnp.arange(b)) for a in (q_NbH, k_GbH))
        return compute.attention(
            "attention",
            *(q_NbH, k_GbH, v_GbH),
            window=self.window,
            num_empty=_num_empty(K, context),
            # In arrays of their own, apart from the new keys: the inner gradient treats the cache as a constant, and so
            # computes no cotangents for it.
            cached_k=self._rotated(state.k, jnp.arange(K)),
            cached_v=state.v,
            backend=self.config.attention_backend,
            **options,
        )

    def _attend_one(self, q_N1H, k_G1H, v_G1H, prepared: KeyValues, draft: KeyValues, context: Context):
        """Attends from a token to the cached positions, those of the draft and itself.

        Returns the heads' outputs [N, H], their lse [N], and what the token adds to the draft.
        """
        K, b, count = prepared.k.shape[1], draft.k.shape[1], context.count
        q_N1H, k_G1H = (self._rotated(a, K + count + jnp.arange(1)) for a in (q_N1H, k_G1H))
        # Positions count from the beginning of the cache, and the token stands at K + count.
        reach = self.window or K + b + 1
        place_K, place_b = jnp.arange(K), jnp.arange(b)
        is_visible_K = (place_K >= _num_empty(K, context)) & (place_K > K + count - reach)
        out_NH, lse_N = attend_one(
            q_N1H[:, 0],
            *([Keys(*prepared, is_visible_K)] if K else []),
            Keys(*draft, (place_b < count) & (place_b > count - reach)),
            Keys(k_G1H, v_G1H, jnp.ones(1, bool)),
        )
        return out_NH, lse_N, KeyValues(k_G1H, v_G1H)

    def _output(self, out_NTH, compute: Pass):
        """Projects the heads' outputs [N, T, H] to [T, D]."""
        out_T = out_NTH.swapaxes(-3, -2)
        out_T = out_T.reshape(*out_T.shape[:-2], -1)
        return compute.product("attention.o", out_T, self.wo[...], divided=self.is_divided)

    @property
    def is_divided(self) -> bool:
        """Whether the matrices hold only one device's heads (tensor parallelism, parts.py)."""
        return self.wo.get_value().shape[-2] < self.config.num_attention_heads * self.config.head_dim

    def _rotated(self, x_NTH, positions_T):
        config = self.config
        scaling = None
        if config.rope_scaling_factor:
            of_frequencies = config.rope_low_freq_factor, config.rope_high_freq_factor
            scaling = Scaling(config.rope_scaling_factor, *of_frequencies, config.rope_original_positions)
        return rotate(x_NTH, positions_T, theta=config.rope_theta, style=config.rope_style, scaling=scaling)

    def _heads(self, x_T):
        """Splits [T, N H] into heads [N, T, H]."""
        return x_T.reshape(*x_T.shape[:-1], -1, self.config.head_dim).swapaxes(-3, -2)


def _num_empty(K: int, context: Context):
    """Counts the empty positions at the front of a cache of K positions."""
    return jnp.maximum(K - context.start, 0)


register("attention", lambda config, rngs: Attention(config, rngs, window=0))
