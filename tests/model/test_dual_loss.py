"""The closed forms equal autodiff of the plain loss, whether the vocabulary fits in one block or takes several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_e2e.model import loss
from ttt_e2e.model.dual_loss import dual_nll, head_pass

T, D, V = 6, 5, 23


@pytest.fixture(params=(2**24, 5 * T), ids=("one block", "five blocks, the last overlapping"))
def max_logits(request, monkeypatch):
    monkeypatch.setattr(loss, "MAX_LOGITS", request.param)


def draw(*shapes, dtype=np.float64):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def plain(x_TD, head_DV, targets_T):
    logits_TV = x_TD @ head_DV
    return jax.nn.logsumexp(logits_TV, axis=-1) - jnp.take_along_axis(logits_TV, targets_T[:, None], axis=1)[:, 0]


TARGETS = np.array([0, 3, 22, 22, 7, 19])


def test_forward_and_first_gradient(float64, max_logits):
    x, head = draw((T, D), (D, V))
    forward = head_pass(x, head, TARGETS)
    np.testing.assert_allclose(forward.nll_T, plain(x, head, TARGETS), rtol=1e-12)
    gradient = jax.grad(lambda x: plain(x, head, TARGETS).sum())(x)
    np.testing.assert_allclose(forward.gradient_TD, gradient, atol=1e-13)


def test_tangent_and_the_gradients_of_both(float64, max_logits):
    x, x_dot, head, a, b = draw((T, D), (T, D), (D, V), (T,), (T,))

    def plain_dual(x, x_dot, head):
        return jax.jvp(lambda x: plain(x, head, TARGETS), (x,), (x_dot,))

    expected, expected_pull_back = jax.vjp(plain_dual, x, x_dot, head)
    forward = head_pass(x, head, TARGETS)
    ours, pull_back = jax.vjp(lambda x, x_dot, head: dual_nll(x, x_dot, head, TARGETS, forward), x, x_dot, head)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=1e-12), ours, expected)
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, atol=1e-12), pull_back((a, b)), expected_pull_back((a, b))
    )


def test_saturated_logits_stay_finite(max_logits):
    x, x_dot, head = draw((T, D), (T, D), (D, V), dtype=np.float32)
    x = x * 1e4
    forward = head_pass(x, head, TARGETS)
    _, pull_back = jax.vjp(lambda x, x_dot, head: dual_nll(x, x_dot, head, TARGETS, forward), x, x_dot, head)
    out = pull_back((jnp.ones(T), jnp.ones(T)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((forward, out)))


def test_bfloat16_is_as_near_to_float32_as_the_plain_loss_is():
    """Both round hidden states, head and probabilities to 8 bits; factor 2 for the luck of a draw."""
    x, head = draw((T, D), (D, V), dtype=np.float32)
    exact = jax.grad(lambda x: plain(x, head, TARGETS).sum())(x)
    x16, head16 = x.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    reference = jax.grad(lambda x: loss.token_nll(x, head16, TARGETS).sum())(x16)
    ours = head_pass(x16, head16, TARGETS).gradient_TD

    def error(gradient):
        return np.linalg.norm(gradient.astype(jnp.float32) - exact)

    assert error(ours) <= 2 * error(reference)
