"""One inner step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_e2e.config import InnerConfig
from ttt_e2e.inner import clip_scale, inner_learning_rate
from ttt_e2e.inner.step import sgd_update


def test_learning_rate_rises_from_warmup_init_and_stays():
    inner = InnerConfig(learning_rate=0.5, warmup_init=0.1, warmup_steps=4)
    rates = [float(inner_learning_rate(inner, step)) for step in range(6)]
    np.testing.assert_allclose(rates, [0.2, 0.3, 0.4, 0.5, 0.5, 0.5], rtol=1e-6)  # float32


def test_learning_rate_is_constant_without_warmup():
    inner = InnerConfig(learning_rate=0.5, warmup_init=0.1, warmup_steps=0)
    assert [float(inner_learning_rate(inner, step)) for step in (0, 1, 1000)] == [0.5] * 3


def test_outer_step_may_be_traced():
    inner = InnerConfig(learning_rate=0.5, warmup_init=0.1, warmup_steps=4)
    rates = jax.vmap(lambda step: inner_learning_rate(inner, step))(jnp.arange(6))
    np.testing.assert_allclose(rates, [0.2, 0.3, 0.4, 0.5, 0.5, 0.5], rtol=1e-6)


gradients = st.lists(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3), min_size=1, max_size=3)


@given(gradient=gradients, clip_norm=st.floats(1e-3, 1e3))
def test_clipped_gradient_is_no_longer_than_the_clip_and_one_within_it_is_untouched(gradient, clip_norm):
    leaves = [np.array(leaf) for leaf in gradient]
    norm = np.linalg.norm(np.concatenate(leaves))
    scale = float(clip_scale(jax.tree.map(jnp.asarray, leaves), clip_norm))
    if norm <= clip_norm * (1 - 1e-12):
        assert scale == 1
    else:
        np.testing.assert_allclose(scale, min(1, clip_norm / norm), rtol=1e-12)
        assert scale * norm <= clip_norm * (1 + 1e-12)


@given(gradient=gradients)
def test_clip_of_0_is_off(gradient):
    assert clip_scale([jnp.array(leaf) for leaf in gradient], 0.0) == 1


@pytest.mark.parametrize("norm", [0.0, 1e-30, 0.999, 1.001, 1e6])
def test_clip_scale_has_a_finite_derivative(norm):
    """The scale is differentiated by the meta-gradient: d(clip/|g|) = -clip g/|g|^3 where it clips, 0 where not."""
    direction = np.array([0.6, -0.8])
    derivative = jax.grad(lambda g: clip_scale({"w": g}, 1.0))(jnp.asarray(norm * direction))
    np.testing.assert_allclose(derivative, -direction / norm**2 if norm > 1 else [0, 0], rtol=1e-12)


@pytest.mark.parametrize("clip_norm, scale", [(0.0, 1), (26.0, 1), (6.5, 0.5)])
def test_update_is_a_clipped_step_down_the_gradient(clip_norm, scale):
    fast = {"w1": jnp.array([1.0, 2.0]), "w2": jnp.array([3.0])}
    gradient = {"w1": jnp.array([3.0, 4.0]), "w2": jnp.array([12.0])}  # of norm 13 over both
    updated = sgd_update(fast, gradient, 0.1 * clip_scale(gradient, clip_norm))
    np.testing.assert_allclose(updated["w1"], np.array([1, 2]) - 0.1 * scale * np.array([3, 4]), rtol=1e-13)
    np.testing.assert_allclose(updated["w2"], 3 - 0.1 * scale * 12, rtol=1e-13)
