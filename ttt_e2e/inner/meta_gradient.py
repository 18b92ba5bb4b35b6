"""The inner loop with its own reverse: a custom VJP over the whole scan (derived in docs/meta_gradient.md).

The reverse of mini-batch i, given the cotangent W_bar of W_{i+1}, takes one reverse pass over the dual program

    (W, cache, slow, x) -> (loss, nll, cache', d/de loss(W + e u)),    u = -eta s (W_bar - D <D, W_bar> / |D|^2),

where D = W_i - W_{i+1} and s is the clip scale; the projection stands only where the gradient was clipped. That pass
holds one mini-batch's residuals at a time and differentiates nothing twice in reverse.

Shapes: `M` mini-batches of the sequence, `b` inner mini-batch, `D` model width, `L` suffix blocks, `K` cached
positions, `S` = K + M b positions of the key/value stream, `G` key/value heads, `H` head width.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.config import InnerConfig
from ttt_e2e.inner import trajectory
from ttt_e2e.inner.step import MiniBatch, clip_scale, is_cut, mini_batch_loss, sgd_update
from ttt_e2e.model import KeyValues
from ttt_e2e.model.parameters import merge


class _Residuals(NamedTuple):
    """What the forward scan leaves for the reverse one."""

    slow: Any
    mini_batches: MiniBatch
    learning_rate: jax.Array
    stream_LSGH: KeyValues  # K empty positions, then every mini-batch's keys and values; window caches are slices of it
    scale_M: jax.Array  # clip scales
    trajectory: Any  # what rebuilds W_i
    final_fast: Any  # W_M


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def adapt(suffix_def, inner: InnerConfig, fast, slow, mini_batches: MiniBatch, learning_rate):
    """Reads all mini-batches in turn; returns (losses [M], NLL [M, b], final fast weights).

    Differentiable in `fast`, `slow` and the hidden states; the learning rate is a constant.
    """
    return _forward(suffix_def, inner, fast, slow, mini_batches, learning_rate)[0]


def _forward(suffix_def, inner: InnerConfig, fast, slow, mini_batches: MiniBatch, learning_rate):
    M, b, _ = mini_batches.x_bD.shape
    suffix = merge(suffix_def, fast, slow)
    K = suffix.cache_size(M * b)

    def inner_step(carry, step):
        fast, stream = carry
        mini_batch, i = step
        (loss, (nll_b, new)), gradient = _inner_gradient(suffix_def, fast, slow, stream, mini_batch, i, K)
        scale = clip_scale(gradient, inner.clip_norm)
        next_fast, saved = trajectory.take_step(inner, fast, gradient, learning_rate * scale)
        stream = jax.tree.map(lambda s, n: jax.lax.dynamic_update_slice_in_dim(s, n, K + i * b, axis=1), stream, new)
        return (next_fast, stream), ((loss, nll_b, scale), saved)

    carry = (fast, suffix.empty_cache(K + M * b))
    steps = (mini_batches, jnp.arange(M))
    (final, stream), ((loss_M, nll_Mb, scale_M), saved) = trajectory.scan(inner, inner_step, carry, steps)
    residuals = _Residuals(slow, mini_batches, learning_rate, stream, scale_M, saved, final)
    return (loss_M, nll_Mb, final), residuals


def _reverse(suffix_def, inner: InnerConfig, residuals: _Residuals, cotangents):
    loss_bar_M, nll_bar_Mb, final_bar = cotangents
    slow, mini_batches, learning_rate, stream, scale_M, saved, final = residuals
    M, b, _ = mini_batches.x_bD.shape
    K = stream.k.shape[1] - M * b
    zeros = partial(jax.tree.map, jnp.zeros_like)

    def replay_step(fast, step):
        mini_batch, i, scale, *_ = step
        _, gradient = _inner_gradient(suffix_def, fast, slow, stream, mini_batch, i, K)
        return sgd_update(fast, gradient, learning_rate * scale)

    def reverse_step(carry, fast, update, step):
        fast_bar, cache_bar, slow_bar = carry
        mini_batch, i, scale, loss_bar, nll_bar_b = step
        cache = _window_cache(stream, i, b, K)

        def loss(fast, cache, slow, x_bD):
            here = mini_batch._replace(x_bD=x_bD)
            loss, (nll_b, new) = mini_batch_loss(
                suffix_def, fast, slow, cache, jnp.maximum(K - i * b, 0), here, remat=inner.remat == "block"
            )
            return loss, nll_b, cache.append(new)

        seeds = (loss_bar, nll_bar_b, cache_bar)
        if inner.gradient == "first_order":
            _, pull_back = jax.vjp(loss, fast, cache, slow, mini_batch.x_bD)
        else:
            direction = _update_cotangent(fast_bar, update, learning_rate, scale)

            def dual(fast, cache, slow, x_bD):
                out, tangent = jax.jvp(lambda fast: loss(fast, cache, slow, x_bD), (fast,), (direction,))
                return out, tangent[0]

            (_, loss_dot), pull_back = jax.vjp(dual, fast, cache, slow, mini_batch.x_bD)
            seeds = (seeds, jnp.ones_like(loss_dot))
        fast_bar_i, cache_bar, slow_bar_i, x_bar_bD = pull_back(seeds)
        fast_bar = jax.tree.map(jnp.add, fast_bar, fast_bar_i)
        if inner.truncate:
            fast_bar = jax.tree.map(lambda w: jnp.where(is_cut(inner, i), 0, w), fast_bar)
        return (fast_bar, cache_bar, jax.tree.map(jnp.add, slow_bar, slow_bar_i)), x_bar_bD

    steps = (mini_batches, jnp.arange(M), scale_M, loss_bar_M, nll_bar_Mb)
    carry = (final_bar, zeros(_window_cache(stream, 0, b, K)), zeros(slow))
    (fast_bar, _, slow_bar), x_bar = trajectory.reverse_scan(
        inner, reverse_step, replay_step, carry, final, saved, steps
    )
    return fast_bar, slow_bar, MiniBatch(x_bar, None, None), None


adapt.defvjp(_forward, _reverse)


def _inner_gradient(suffix_def, fast, slow, stream: KeyValues, mini_batch: MiniBatch, i, K: int):
    """Value and gradient of `mini_batch_loss` of mini-batch i with respect to the fast weights."""
    b = mini_batch.targets_b.shape[0]
    loss = partial(mini_batch_loss, suffix_def)
    cache = _window_cache(stream, i, b, K)
    return jax.value_and_grad(loss, has_aux=True)(fast, slow, cache, jnp.maximum(K - i * b, 0), mini_batch)


def _window_cache(stream_LSGH: KeyValues, i, b: int, K: int) -> KeyValues:
    """The window caches [L, K, G, H] that mini-batch i sees: the K positions before it."""
    return jax.tree.map(lambda s: jax.lax.dynamic_slice_in_dim(s, i * b, K, axis=1), stream_LSGH)


def _update_cotangent(fast_bar, update, learning_rate, scale):
    """u: the cotangent of g in W_{i+1} = W_i - eta s(g) g, given that of W_{i+1}.

    `update` is D = W_i - W_{i+1}, parallel to g: where the gradient was clipped, s(g) g has a constant norm, and what
    is parallel to g drops out. Nothing is divided by eta, which may be 0.
    """
    squared_norm = _inner_product(update, update)
    clipped = (scale < 1) & (squared_norm > 0)
    parallel = jnp.where(clipped, _inner_product(update, fast_bar) / jnp.where(clipped, squared_norm, 1), 0)
    rate = learning_rate * scale
    return jax.tree.map(lambda w_bar, d: -(rate * (w_bar - parallel * d)).astype(w_bar.dtype), fast_bar, update)


def _inner_product(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
