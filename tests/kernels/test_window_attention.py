"""Window attention. Shapes: `T` queries, `S` keys, `N` query heads, `G` key/value heads, `H` head width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_e2e.kernels import window_attention

H = 4


def random_qkv(T, S, N=4, G=2, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape) for shape in ((N, T, H), (G, S, H), (G, S, H))]


def one_query_at_a_time(q_NTH, k_GSH, v_GSH, window, num_empty):
    (N, T, _), (G, S, _) = q_NTH.shape, k_GSH.shape
    out_NTH = np.empty_like(q_NTH)
    for i in range(T):
        position = S - T + i
        first = max(num_empty, position + 1 - window if window else 0)
        for n in range(N):
            g = n // (N // G)
            scores = k_GSH[g, first : position + 1] @ q_NTH[n, i] / np.sqrt(H)
            weights = np.exp(scores) / np.exp(scores).sum()
            out_NTH[n, i] = weights @ v_GSH[g, first : position + 1]
    return out_NTH


@pytest.mark.parametrize("N, G", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(
    "T, S, window, num_empty",
    [
        (6, 6, 1, 0),  # each position sees itself alone
        (6, 6, 3, 0),  # k < T
        (6, 6, 6, 0),
        (6, 6, 50, 0),  # k > S
        (6, 6, 0, 0),  # full attention
        (4, 9, 5, 0),  # a window cache of 5 and a mini-batch of 4
        (4, 9, 5, 5),  # the same, nothing read yet
        (4, 9, 5, 2),  # the same, partly filled
        (4, 9, 0, 3),
    ],
)
def test_equals_one_query_at_a_time(float64, T, S, window, num_empty, N, G):
    q_NTH, k_GSH, v_GSH = random_qkv(T, S, N, G)
    out_NTH = window_attention(q_NTH, k_GSH, v_GSH, window=window, num_empty=num_empty)
    expected = one_query_at_a_time(q_NTH, k_GSH, v_GSH, window, num_empty)
    assert out_NTH.dtype == jnp.float64
    np.testing.assert_allclose(out_NTH, expected, rtol=1e-12, atol=1e-14)  # float64, sums of nine terms


def test_number_of_empty_keys_may_be_traced(float64):
    q_NTH, k_GSH, v_GSH = random_qkv(4, 9)

    @jax.jit
    def attend(num_empty):
        return window_attention(q_NTH, k_GSH, v_GSH, window=5, num_empty=num_empty)

    for num_empty in (0, 2, 5):
        expected = one_query_at_a_time(q_NTH, k_GSH, v_GSH, 5, num_empty)
        np.testing.assert_allclose(attend(num_empty), expected, rtol=1e-12, atol=1e-14)


def test_empty_keys_have_no_influence_whatever_they_hold(float64):
    q_NTH, k_GSH, v_GSH = random_qkv(4, 9)
    k_other, v_other = k_GSH.copy(), v_GSH.copy()
    k_other[:, :3], v_other[:, :3] = 1e9, -1e9
    out = window_attention(q_NTH, k_GSH, v_GSH, window=0, num_empty=3)
    np.testing.assert_array_equal(out, window_attention(q_NTH, k_other, v_other, window=0, num_empty=3))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("window", [0, 24])
def test_later_keys_have_no_influence_not_even_by_rounding(dtype, window):
    """Nor do they on derivatives with respect to what is earlier, by forward and by reverse mode."""
    T, earlier_keys = 70, 41
    arrays = [jnp.asarray(a, dtype) for a in random_qkv(T, T)]
    others = [a.at[:, earlier_keys:].set(7 - 5 * a[:, earlier_keys:]) for a in arrays]

    @jax.jit
    def earlier(*arrays):
        def attend(*arrays):
            return window_attention(*arrays, window=window)[:, :earlier_keys]

        out, pull_back = jax.vjp(attend, *arrays)
        dot = jax.jvp(attend, arrays, tuple(jnp.roll(a, 1, axis=-1) for a in arrays))[1]
        return out, dot, [bar[:, :earlier_keys] for bar in pull_back(out)]

    for ours, theirs in zip(jax.tree.leaves(earlier(*arrays)), jax.tree.leaves(earlier(*others)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_result_has_the_dtype_of_the_values(dtype):
    q_NTH, k_GSH, v_GSH = (jnp.asarray(a, dtype) for a in random_qkv(4, 9))
    assert window_attention(q_NTH, k_GSH, v_GSH, window=5).dtype == dtype


def test_softmax_of_bfloat16_inputs_is_float32():
    """Two keys whose scores, 256 and 257, are one and the same number in bfloat16."""
    q_NTH = jnp.asarray([[[2.0, 2, 0, 0]]], jnp.bfloat16)
    k_GSH = jnp.asarray([[[256.0, 0, 0, 0], [256, 1, 0, 0]]], jnp.bfloat16)
    v_GSH = jnp.asarray([[[0.0] * 4, [1.0] * 4]], jnp.bfloat16)
    out_NTH = window_attention(q_NTH, k_GSH, v_GSH, window=0)
    expected = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(out_NTH.astype(jnp.float32), expected, rtol=2**-8)  # one rounding to bfloat16


@pytest.mark.parametrize("score", [1e4, -1e4])
def test_second_derivative_is_finite_where_the_softmax_saturates(score):
    """Mini-batches are learned from by gradient, and that is differentiated again; float32, as in training."""
    q_NTH, k_GSH, v_GSH = (jnp.asarray(a, jnp.float32) for a in random_qkv(4, 9))
    # One channel is large in every query and in one key alone, whose score it makes about `score`.
    q_NTH = q_NTH.at[..., 0].set(1e2)
    k_GSH = k_GSH.at[:, 6, 0].set(score / 1e2 * H**0.5)

    def loss(qkv):
        return jnp.sum(window_attention(*qkv, window=5, num_empty=2) ** 2)

    def squared_gradient(qkv):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(qkv)))

    for gradient in jax.jit(jax.grad(squared_gradient))((q_NTH, k_GSH, v_GSH)):
        assert np.isfinite(gradient).all()
        assert np.any(gradient != 0)
