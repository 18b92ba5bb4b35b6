"""What rebuilds the fast weights on the way back, without a model around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_e2e.config import InnerConfig
from ttt_e2e.inner import trajectory

M = 128
RATE = 1.0


def walk(inner: InnerConfig):
    """(W_0 ... W_{M-1} as the forward scan had them, the same as the reverse scan rebuilds them), float32."""
    random = np.random.default_rng(0)
    start = jnp.asarray(0.02 * random.normal(size=(16, 24)), jnp.float32)
    gradients_M = jnp.asarray(random.normal(size=(M, 16, 24)) / np.sqrt(16 * 24), jnp.float32)  # of norm 1: clipped

    def inner_step(carry, gradient):
        (fast,) = carry
        next_fast, saved = trajectory.take_step(inner, fast, gradient, RATE)
        return (next_fast,), (fast, (saved, ()))

    def reverse_step(carry, taken, known, gradient):
        return carry, taken.weights()

    def replay_step(fast, gradient):
        return fast - RATE * gradient, ()

    (final,), (forward_M, saved) = trajectory.scan(inner, inner_step, (start,), gradients_M)
    _, (rebuilt_M, updates_M) = trajectory.reverse_scan(inner, reverse_step, replay_step, (), saved, gradients_M)
    np.testing.assert_allclose(updates_M, forward_M - jnp.concatenate([forward_M[1:], final[None]]), atol=1e-6)
    return forward_M, rebuilt_M


@pytest.mark.parametrize("policy", ["store", "segment"])
def test_rebuilds_to_the_bit(policy):
    forward_M, rebuilt_M = walk(InnerConfig(trajectory=policy))
    np.testing.assert_array_equal(forward_M, rebuilt_M)


def test_delta_walks_back_to_the_initial_weights():
    """Through 128 mini-batches whose updates are far larger than the weights; only float32 addition is inexact."""
    forward_M, rebuilt_M = walk(InnerConfig(trajectory="delta"))
    error = np.linalg.norm(rebuilt_M[0] - forward_M[0]) / np.linalg.norm(forward_M[0])
    assert error < 1e-5, error


def test_delta_keeps_half_the_bytes():
    def kept(policy):
        return trajectory.take_step(InnerConfig(trajectory=policy), jnp.zeros(8), jnp.ones(8), RATE)[1]

    with jax.enable_x64(False):
        assert kept("delta").nbytes * 2 == kept("store").nbytes == 8 * 4


@pytest.mark.parametrize(("count", "length"), [(1, 1), (32, 4), (36, 6), (7, 1), (128, 8)])
def test_segments_are_about_as_long_as_they_are_many(count, length):
    assert trajectory.segment_length(InnerConfig(), count) in (length, count // length)
    assert trajectory.segment_length(InnerConfig(segment_length=2), count) == 2
