"""Next-token loss. Shapes: `T` positions, `D` model width, `V` vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_e2e.model import loss
from ttt_e2e.model.loss import masked_mean, token_nll

T, D, V = 12, 5, 7


@pytest.fixture
def x_head_targets(float64):
    random = np.random.default_rng(0)
    return random.normal(size=(T, D)), random.normal(size=(D, V)), random.integers(0, V, T)


def test_nll_is_minus_the_log_of_the_softmax(x_head_targets):
    x_TD, head_DV, targets_T = x_head_targets
    p_TV = np.exp(x_TD @ head_DV)
    expected = -np.log(p_TV[np.arange(T), targets_T] / p_TV.sum(axis=-1))
    np.testing.assert_allclose(token_nll(*map(jnp.asarray, x_head_targets)), expected, rtol=1e-13)


@pytest.mark.parametrize("tokens_at_once", [1, 3, 5, 0])  # 5 does not divide T, and not even one token's logits fit 0
def test_blocks_change_neither_the_nll_nor_its_gradient(x_head_targets, tokens_at_once, monkeypatch):
    x_TD, head_DV, targets_T = map(jnp.asarray, x_head_targets)
    weights_T = jnp.arange(1.0, T + 1)  # so that blocks out of order would show

    def run():
        def weighted_nll(x_TD, head_DV):
            nll_T = token_nll(x_TD, head_DV, targets_T)
            return weights_T @ nll_T, nll_T

        return jax.value_and_grad(weighted_nll, argnums=(0, 1), has_aux=True)(x_TD, head_DV)

    whole = run()
    monkeypatch.setattr(loss, "MAX_LOGITS", tokens_at_once * V + 1)
    blocked = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), whole, blocked)


def test_logits_of_a_few_tokens_exist_at_a_time(x_head_targets, monkeypatch):
    x_TD, head_DV, targets_T = map(jnp.asarray, x_head_targets)
    logits = f"f64[{T},{V}]"

    def program():
        return str(jax.make_jaxpr(jax.grad(lambda x_TD: token_nll(x_TD, head_DV, targets_T).sum()))(x_TD))

    assert logits in program()
    monkeypatch.setattr(loss, "MAX_LOGITS", 3 * V)
    assert logits not in program() and f"f64[3,{V}]" in program()


def test_saturated_logits_have_a_finite_nll_and_gradient():
    x_TD, head_DV = jnp.full((T, D), 1e3), jnp.eye(D, V) * 1e3
    targets_T = jnp.arange(T) % V
    nll_T, gradient = jax.value_and_grad(lambda x_TD: token_nll(x_TD, head_DV, targets_T).sum())(x_TD)
    assert np.isfinite(nll_T) and np.isfinite(gradient).all()


def test_logits_of_bfloat16_are_float32():
    x_TD = jnp.ones((T, D), jnp.bfloat16)
    head_DV = jnp.asarray(np.random.default_rng(0).normal(size=(D, V)), jnp.bfloat16)
    targets_T = jnp.zeros(T, int)
    narrow, wide = token_nll(x_TD, head_DV, targets_T), token_nll(x_TD.astype(jnp.float32), head_DV, targets_T)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, rtol=1e-6)  # float32 sums of five exact products


def test_masked_mean_is_over_the_unmasked_of_the_last_axis():
    nll = jnp.asarray([[1.0, 2, 30], [4, 50, 60]])
    is_target = jnp.asarray([[True, True, False], [True, False, False]])
    np.testing.assert_allclose(masked_mean(nll, is_target), [1.5, 4], rtol=1e-7)


@pytest.mark.parametrize("nll", [1.0, np.inf, np.nan])
def test_masked_mean_of_nothing_is_0_with_zero_gradient(nll):
    value, gradient = jax.value_and_grad(masked_mean)(jnp.full(4, nll), jnp.zeros(4, bool))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
