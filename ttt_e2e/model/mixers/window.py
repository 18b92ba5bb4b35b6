"""Attention of each position to the `config.model.sliding_window` most recent ones, itself included.

With `config.model.attention_sinks`, also to the first positions of the sequence (arXiv 2309.17453). Models that were
trained with full attention put what is left of a softmax there, and fail where a window has lost them. A sink stays as
far away as it is where the window has just left all of them: so rotations are those that the model knows, however long
the sequence is.

Shapes: `T` positions, `b` inner mini-batch, `K` cached positions, `S` sinks, `N` query heads, `G` key/value heads,
`H` head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.kernels.attention.sinks import add_keys
from ttt_e2e.model.mixers.attention import Attention, KeyValues
from ttt_e2e.model.mixers.base import Context, register
from ttt_e2e.model.passes import Pass


class WithSinks(NamedTuple):
    """A State, an Entry, a Draft, or what a token adds to a Draft: that of `Attention`, and the sinks after it."""

    recent: KeyValues
    sinks: KeyValues  # [G, S, H], unrotated; zeros where a position was not read yet


class LogWithSinks(NamedTuple):
    """The Log of `Attention`, and the sinks before each mini-batch."""

    recent: object
    sinks_M: KeyValues  # [M, G, S, H]


class SinkAttention(Attention):
    """Attention to a window and to the first `config.attention_sinks` positions."""

    def whole(self, x_TD, compute: Pass, context: Context):  # noqa: D102 (see `Mixer`)
        q_NTH, k_GTH, v_GTH = self._project(x_TD, compute)
        T = x_TD.shape[-2]
        result = compute.attention(
            "attention",
            *(self._rotated(a, jnp.arange(T)) for a in (q_NTH, k_GTH)),
            v_GTH,
            window=self.window,
            with_lse=True,
            backend=self.config.attention_backend,
        )
        sinks = KeyValues(*(a[..., : self.config.attention_sinks, :] for a in (k_GTH, v_GTH)))
        return self._output(self._with_sinks(*result, q_NTH, sinks, jnp.arange(T), compute), compute)

    def extend(self, x_bD, compute: Pass, state: WithSinks, context: Context):  # noqa: D102
        q_NbH, k_GbH, v_GbH = self._project(x_bD, compute)
        result = self._attend(q_NbH, k_GbH, v_GbH, compute, state.recent, context, with_lse=True)

        def after(new, old):
            return _overlay(old, new, context.start, context.count), None

        sinks, _ = compute.call(after, KeyValues(k_GbH, v_GbH), state.sinks)
        positions_b = context.start + jnp.arange(x_bD.shape[-2])
        out_NbH = self._with_sinks(*result, q_NbH, sinks, positions_b, compute)
        entry = WithSinks(KeyValues(compute.value(k_GbH), compute.value(v_GbH)), jax.tree.map(compute.value, sinks))
        return self._output(out_NbH, compute), entry

    def decode(self, x_1D, compute: Pass, prepared: WithSinks, draft: WithSinks, context: Context):  # noqa: D102
        q_N1H, k_G1H, v_G1H = self._project(x_1D, compute)
        out_NH, lse_N, added = self._attend_one(q_N1H, k_G1H, v_G1H, prepared.recent, draft.recent, context)
        position = context.start + context.count
        sinks = _overlay(draft.sinks, KeyValues(k_G1H, v_G1H), position)
        out_N1H = self._with_sinks(out_NH[:, None], lse_N[:, None], q_N1H, sinks, position + jnp.arange(1), compute)
        return self._output(out_N1H, compute), WithSinks(added, sinks)

    def empty(self, capacity: int) -> WithSinks:  # noqa: D102
        return WithSinks(super().empty(capacity), super().empty(self.config.attention_sinks))

    def resize(self, state: WithSinks, capacity: int) -> WithSinks:  # noqa: D102
        return state._replace(recent=super().resize(state.recent, capacity))

    def advance(self, state: WithSinks, entry: WithSinks) -> WithSinks:  # noqa: D102
        return WithSinks(super().advance(state.recent, entry.recent), entry.sinks)

    def log(self, first: WithSinks, entries_M: WithSinks) -> LogWithSinks:  # noqa: D102
        before_M = jax.tree.map(lambda s, e: jnp.concatenate([s[None], e[:-1]]), first.sinks, entries_M.sinks)
        return LogWithSinks(super().log(first.recent, entries_M.recent), before_M)

    def at(self, log: LogWithSinks, i, take) -> WithSinks:  # noqa: D102
        sinks = jax.tree.map(lambda a: jnp.squeeze(take(a, i, 1, -4), -4), log.sinks_M)
        return WithSinks(super().at(log.recent, i, take), sinks)

    def draft(self, state: WithSinks, b: int, entry: WithSinks | None = None, count=0) -> WithSinks:  # noqa: D102
        recent = super().draft(state.recent, b, entry and entry.recent, count)
        return WithSinks(recent, entry.sinks if entry else state.sinks)

    def append(self, draft: WithSinks, added: WithSinks, count) -> WithSinks:  # noqa: D102
        return WithSinks(super().append(draft.recent, added.recent, count), added.sinks)

    def prepare(self, state: WithSinks) -> WithSinks:  # noqa: D102
        return state._replace(recent=super().prepare(state.recent))

    def flops(self, seq_len: int) -> float:  # noqa: D102
        config = self.config
        return super().flops(seq_len) + 4 * config.num_attention_heads * config.head_dim * config.attention_sinks

    def obstacle(self, use: str) -> str:  # noqa: D102
        if use == "sequence axis":
            return "with config.model.attention_sinks does not divide the positions of a sequence over devices"
        return super().obstacle(use)

    def _with_sinks(self, out_NTH, lse_NT, q_NTH, sinks: KeyValues, positions_T, compute: Pass):
        """Adds the sinks to the attention of queries at these positions of the sequence, where the window left them."""
        S = sinks.k.shape[-2]
        q_NTH = self._rotated(q_NTH, jnp.minimum(positions_T, S + self.window - 1))
        visible_TS = positions_T[:, None] - jnp.arange(S) >= self.window
        arrays = (out_NTH, lse_NT, q_NTH, self._rotated(sinks.k, jnp.arange(S)), sinks.v)
        return compute.apply(lambda *arrays: add_keys(*arrays, visible_TS), *arrays)


def _overlay(sinks: KeyValues, new: KeyValues, start, count=None) -> KeyValues:
    """Puts new positions, from `start` on, over those of the sinks that are not read yet; the first `count`, or all."""
    S, b = sinks.k.shape[-2], new.k.shape[-2]
    place_S = jnp.arange(S) - start  # of each sink among the new positions
    is_new_S = (place_S >= 0) & (place_S < (b if count is None else count))
    place_S = jnp.clip(place_S, 0, b - 1)
    return jax.tree.map(
        lambda old, a: jnp.where(is_new_S[:, None], jnp.take(a, place_S, axis=-2), old.astype(a.dtype)), sinks, new
    )


def make(config, rngs) -> Attention:
    """Makes the mixer of `config.model`."""
    return (SinkAttention if config.attention_sinks else Attention)(config, rngs, window=config.sliding_window)


register("window", make)
