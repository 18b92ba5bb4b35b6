"""Key-value binding in closed form equals the released operation, and the equations token by token, in any pieces.

Float64: both are the same sums in other orders, so 1e-9 leaves room for a thousandfold of rounding and more.

Shapes: `N` heads, `T` tokens, `H` head width, `F` width of f.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_e2e.kernels import key_value_binding
from ttt_e2e.kernels.key_value_binding import Tokens, Weights, chunked, reference

GOLDEN = Path(__file__).parents[1] / "data" / "ttt_kvb_op" / "golden.npz"
GOLDEN_CHUNK = 32
N, H, F, CHUNK = 2, 3, 5, 8


# --------------------------------------------------------------------------------------------- the released operation


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def golden_problem(golden, *, momentum: bool):
    initial = Weights(*(jnp.asarray(golden[name].swapaxes(1, 2)) for name in ("w0", "w1", "w2")))
    rates = Weights(*(jnp.asarray(golden[name][..., 0]) for name in ("lr0", "lr1", "lr2")))
    q, k, v = (jnp.asarray(golden[name]) for name in "qkv")
    return initial, Tokens(q, k, v, rates, jnp.asarray(golden["momentum"][..., 0]) if momentum else None)


def error(y_NTH, golden, name: str) -> float:
    """Largest error, relative to the largest output."""
    return float(np.max(np.abs(y_NTH - golden[name])) / np.max(np.abs(golden[name])))


@pytest.mark.parametrize("momentum", [False, True])
def test_the_released_operation(golden, momentum):
    """1e-5: a hundredfold of float32's rounding."""
    initial, tokens = golden_problem(golden, momentum=momentum)
    name = "y_momentum" if momentum else "y"
    assert error(key_value_binding.whole(initial, tokens, GOLDEN_CHUNK), golden, name) < 1e-5
    state = key_value_binding.empty(initial, momentum=momentum, dtype=jnp.float32)
    y_NTH, _ = key_value_binding.extend(initial, state, tokens, GOLDEN_CHUNK, start=0)
    assert error(y_NTH, golden, name) < 1e-5


def without_norms(initial, memory, gradient, factor_N):
    update = jax.tree.map(lambda g, u: g + factor_N[:, None, None] * u, gradient, memory.update)
    return chunked.Memory(chunked._sum(memory.change, update), update)


def normed_over_the_other_axis(x, axis: int):
    return x / (chunked._norm(x, 3 - axis) + chunked.NORM_EPS)


WRONG_CODE = {  # what is replaced, and by what
    "sigmoid for SiLU": (jax.nn, "silu", jax.nn.sigmoid),
    "rows keep no norm": (chunked, "_learn", without_norms),
    "columns normed, not rows": (chunked, "normed", normed_over_the_other_axis),
}


@pytest.mark.parametrize("wrong", WRONG_CODE)
def test_wrong_operations_are_seen(golden, wrong, monkeypatch):
    monkeypatch.setattr(*WRONG_CODE[wrong])
    initial, tokens = golden_problem(golden, momentum=True)
    assert error(key_value_binding.whole(initial, tokens, GOLDEN_CHUNK), golden, "y_momentum") > 1e-2


def test_exchanged_inputs_are_seen(golden):
    initial, tokens = golden_problem(golden, momentum=True)
    w0, w1, w2 = tokens.rates
    for wrong in (
        tokens._replace(rates=Weights(w1, w0, w2)),
        tokens._replace(q=tokens.k),
        tokens._replace(momentum=None),
        tokens._replace(momentum=tokens.momentum**2),
    ):
        assert error(key_value_binding.whole(initial, wrong, GOLDEN_CHUNK), golden, "y_momentum") > 1e-2


# ------------------------------------------------------------------------------------------------------- the equations


def problem(T: int, *, momentum=True, seed=0):
    """Weights and tokens whose every part matters: rates of up to 1, some of them 0; momentum from 0 to 1."""
    random = np.random.default_rng(seed)
    shapes = ((N, H, F), (N, F, H), (N, H, F))
    initial = Weights(*(jnp.asarray(random.normal(size=shape)) for shape in shapes))
    q, k, v = (jnp.asarray(random.normal(size=(N, T, H))) for _ in range(3))
    rates = Weights(*(jnp.asarray(np.maximum(random.uniform(-0.2, 1, (N, T)), 0)) for _ in range(3)))
    factors = jnp.asarray(np.clip(random.uniform(-0.3, 1.3, (N, T)), 0, 1))
    return initial, Tokens(q, k, v, rates, factors if momentum else None)


def by_the_equations(initial: Weights, tokens: Tokens, chunk_size: int):
    """(y [N, T, H], Weights after the last full chunk)."""

    def of_head(initial, tokens):
        q, k, v, rates, momentum = tokens
        return reference.bind(initial, q, k, v, jnp.stack(rates, -1), momentum, chunk_size=chunk_size)

    y_NTH, weights = jax.vmap(of_head)(initial, tokens)
    return y_NTH, Weights(*weights)


def in_pieces(initial: Weights, tokens: Tokens, ends, chunk_size=CHUNK):
    """(y [N, T, H], State), read by `extend` in pieces that end at `ends`."""
    state = key_value_binding.empty(initial, momentum=tokens.momentum is not None, dtype=initial.w0.dtype)
    y = []
    for start, end in zip((0, *ends), ends):
        piece = jax.tree.map(lambda a, part=slice(start, end): a[:, part], tokens)
        y_NTH, state = key_value_binding.extend(initial, state, piece, chunk_size, start=start)
        y.append(y_NTH)
    return jnp.concatenate(y, axis=1), state


def assert_close(ours, expected, tolerance=1e-9):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance), ours, expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize(("T", "seed"), [(1, 0), (5, 1), (8, 2), (19, 3), (24, 4)])
def test_whole_is_the_equations(T, seed, momentum):
    initial, tokens = problem(T, momentum=momentum, seed=seed)
    expected_NTH, _ = jax.jit(partial(by_the_equations, chunk_size=CHUNK))(initial, tokens)
    assert_close(key_value_binding.whole(initial, tokens, CHUNK), expected_NTH)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("ends", [(19,), (3, 4, 9, 19), (8, 19), (16, 19), (2, 18, 19)], ids=str)
def test_pieces_are_the_equations(ends):
    """Pieces that begin and end anywhere in a chunk, and hold no, one or two of its boundaries."""
    initial, tokens = problem(19)
    y_NTH, state = in_pieces(initial, tokens, ends)
    expected_NTH, weights = jax.jit(partial(by_the_equations, chunk_size=CHUNK))(initial, tokens)
    assert_close(y_NTH, expected_NTH)
    assert_close(jax.tree.map(jnp.add, initial, state.memory.change), weights)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("chunk_size", [4, 6, 8, 16])
def test_a_traced_start_and_padding(chunk_size):
    """Mini-batches of 8, of which the last has padding: any chunk goes with them."""
    T, b = 21, 8
    initial, tokens = problem(T)
    expected_NTH, expected = in_pieces(initial, tokens, (T,), chunk_size)
    padded = jax.tree.map(lambda a: jnp.concatenate([a, jnp.full_like(a[:, :3], 7.0)], axis=1), tokens)
    state = key_value_binding.empty(initial, momentum=True, dtype=jnp.float64)
    extend = jax.jit(partial(key_value_binding.extend, chunk_size=chunk_size))
    y = []
    for start in range(0, T, b):
        piece = jax.tree.map(lambda a, start=start: a[:, start : start + b], padded)
        y_NbH, state = extend(initial, state, piece, start=start, count=min(b, T - start))
        y.append(y_NbH)
    assert_close(jnp.concatenate(y, axis=1)[:, :T], expected_NTH)
    assert_close(state, expected)


def objective(run, initial, tokens):
    """A sum in which every output weighs differently."""
    y_NTH = run(initial, tokens)
    return jnp.vdot(y_NTH, jnp.cos(jnp.arange(y_NTH.size, dtype=y_NTH.dtype)).reshape(y_NTH.shape))


@pytest.mark.usefixtures("float64")
def test_gradients_and_gradients_of_tangents():
    """Reverse, and reverse over forward, as the dual form has it."""
    T, chunk_size = 10, 4
    initial, tokens = problem(T, seed=7)
    _, directions = problem(T, seed=8)

    def gradient(run):
        def both(initial, tokens):
            """Value and tangent in one number."""
            value, tangent = jax.jvp(partial(objective, run, initial), (tokens,), (directions,))
            return value + 0.7 * tangent

        return jax.jit(jax.grad(both, (0, 1)))(initial, tokens)

    expected = gradient(lambda *problem: by_the_equations(*problem, chunk_size)[0])
    assert_close(gradient(partial(key_value_binding.whole, chunk_size=chunk_size)), expected)
    assert_close(gradient(lambda *problem: in_pieces(*problem, (2, T), chunk_size)[0]), expected)


@pytest.mark.usefixtures("float64")
def test_wrong_recurrences_are_seen():
    """Gradients at matrices that move in the chunk; a boundary off by one; momentum summed, not averaged."""
    initial, tokens = problem(19)
    y_NTH, _ = in_pieces(initial, tokens, (19,))
    for wrong in (
        by_the_equations(initial, tokens, 1)[0],
        by_the_equations(initial, tokens, CHUNK + 1)[0],
        by_the_equations(initial, tokens._replace(momentum=CHUNK * tokens.momentum), CHUNK)[0],
    ):
        assert np.max(np.abs(y_NTH - wrong)) > 1e-2


@pytest.mark.usefixtures("float64")
def test_no_derivative_is_nan_where_a_row_is_zero():
    initial, tokens = problem(19)
    initial = initial._replace(w1=initial.w1.at[:, :, 0].set(0.0))
    tokens = tokens._replace(rates=jax.tree.map(jnp.zeros_like, tokens.rates))
    gradient = jax.grad(partial(objective, partial(key_value_binding.whole, chunk_size=CHUNK)), (0, 1))(initial, tokens)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_the_reverse_keeps_no_hidden_state_of_every_token():
    """Of f, which is wide here, it keeps the matrices of each chunk, and the hidden states of the last chunk alone."""
    T, F = 256, 512
    shapes = Weights(jnp.ones((1, 2, F)), jnp.ones((1, F, 2)), jnp.ones((1, 2, F)))
    x_NTH, rate_NT = jnp.ones((1, T, 2)), jnp.ones((1, T))
    tokens = Tokens(x_NTH, x_NTH, x_NTH, Weights(rate_NT, rate_NT, rate_NT), rate_NT)
    for run in (
        partial(key_value_binding.whole, chunk_size=64),
        lambda initial, tokens: key_value_binding.extend(
            initial, key_value_binding.empty(initial, momentum=True, dtype=jnp.float32), tokens, 64, start=0
        )[0],
    ):
        _, pull_back = jax.vjp(run, shapes, tokens)
        assert max(leaf.size for leaf in jax.tree.leaves(pull_back)) <= 64 * F < T * F


def test_bfloat16_is_finite_over_32k_tokens():
    random = np.random.default_rng(0)
    T = 32 * 1024
    initial, _ = jax.tree.map(lambda a: a.astype(jnp.float32), problem(1))
    q, k, v = (key_value_binding.normed(jnp.asarray(random.normal(size=(N, T, H))), -1) for _ in range(3))
    rates = Weights(*(jnp.asarray(random.uniform(0, 1, (N, T)), jnp.float32) for _ in range(3)))
    tokens = Tokens(*(a.astype(jnp.bfloat16) for a in (q, k, v)), rates, jnp.ones((N, T)))
    run = partial(key_value_binding.whole, chunk_size=1024)
    y_NTH, pull_back = jax.vjp(run, initial, tokens)
    assert y_NTH.dtype == jnp.float32
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((y_NTH, pull_back(y_NTH))))
