"""Rounding: bfloat16 and float16 against float64, and scores that saturate the softmax. Shapes: see cases.py."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.cases import Case, relative_error

CASES = {
    "xla": Case(T=48, C=32, N=2, G=1, H=32, window=40),
    "pallas_tpu": Case(T=200, C=120, N=2, G=1, H=32, window=160),  # in several tiles
}


def derivatives(case: Case, backend: str, dtype, x: dict, y: dict, bars) -> dict:
    """Forward, tangent, reverse, and reverse of tangent; arguments are float64 numbers that are exact in `dtype`."""
    x, y, bars = jax.tree.map(lambda a: jnp.asarray(a, dtype), (x, y, bars))

    def attend(x):
        return case.attend(x, backend)

    def all_of_them(x, y):
        with_tangent, pullback = jax.vjp(lambda x, y: jax.jvp(attend, (x,), (y,)), x, y)
        return {
            "forward and tangent": with_tangent,
            "reverse": jax.vjp(attend, x)[1](bars[0])[0],
            "reverse of tangent": pullback(bars),
            "reverse of reverse": jax.vjp(lambda x: jax.vjp(attend, x)[1](bars[1])[0], x)[1](y)[0],
        }

    return jax.jit(all_of_them)(x, y)


@pytest.mark.parametrize(
    "backend, dtype, common",
    [
        *itertools.product(["xla"], [jnp.bfloat16, jnp.float16], [0, 10, 100]),
        ("pallas_tpu", jnp.bfloat16, 100),
        pytest.param("pallas_tpu", jnp.bfloat16, 0, marks=pytest.mark.slow),
        pytest.param("pallas_tpu", jnp.float16, 100, marks=pytest.mark.slow),
    ],
)
def test_error_is_within_twice_that_of_dense_attention(backend, dtype, common):
    """`common`: how far the tangents of a row's scores lie from 0, in terms of their spread: |mu| >> spread."""
    case = CASES[backend]
    x, y = case.problem(0), case.problem(1)
    if common:  # every key moves by the same large vector, on which every query has a positive component
        y = {name: 0.1 * a + (common * 0.1 if name in ("k", "cached_k") else 0) for name, a in y.items()}
        x |= {"q": abs(x["q"])}
    bars = tuple(np.random.default_rng(2).normal(size=(2, case.N, case.T, case.H)))
    exact = [jax.tree.map(lambda a: np.asarray(jnp.asarray(a, dtype).astype(jnp.float32)), z) for z in (x, y, bars)]
    actual, dense = (derivatives(case, name, dtype, *exact) for name in (backend, "reference"))
    with jax.enable_x64(True):
        expected = derivatives(case, "reference", jnp.float64, *exact)
    wide = jax.tree.map(lambda a: np.asarray(a.astype(jnp.float32), np.float64), (actual, dense))
    for name in expected:
        leaves = zip(*map(jax.tree.leaves, (wide[0][name], wide[1][name], expected[name])), strict=True)
        for ours, theirs, truth in leaves:
            assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth), name


@pytest.mark.parametrize("score", [1e4, -1e4])
@pytest.mark.parametrize("window", [0, 5])
def test_no_derivative_is_nan_where_the_softmax_saturates(score, window):
    """Scores of one key are about `score`; up to third derivatives, in float32."""
    case = Case(T=12, C=4, N=2, G=1, H=4, window=window, num_empty=2)
    x, y = case.problem(0, jnp.float32), case.problem(1, jnp.float32)
    x["q"] = x["q"].at[..., 0].set(1e2)
    x["k"] = x["k"].at[:, 6, 0].set(score / 1e2 * case.H**0.5)

    def loss(x):
        return jnp.sum(case.attend(x) ** 2)

    def along(function):
        return lambda x: jax.jvp(function, (x,), (y,))[1]

    orders = [loss, jax.grad(loss), along(jax.grad(loss)), jax.grad(along(along(loss)))]
    orders.append(jax.grad(lambda x: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(x)))))
    for leaf in jax.tree.leaves(jax.jit(lambda: [derivative(x) for derivative in orders])()):
        assert np.isfinite(leaf).all()
