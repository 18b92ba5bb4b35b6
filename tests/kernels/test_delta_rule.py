"""The gated delta rule by chunks equals the recurrence.

Shapes: `N` heads, `T` tokens, `K` width of keys, `V` width of values.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_e2e.kernels import chunks
from ttt_e2e.kernels.delta_rule import chunked, delta_rule, reference

N, K, V, CHUNK = 2, 3, 5, 4


def problem(T: int, log_decay=None, beta=None, dtype=np.float64, seed: int = 0):
    """Queries, keys of norm 1, values, rates, decays, and a state that is not zero."""
    random = np.random.default_rng(seed)
    q, k, v, state = (random.normal(size=size) for size in ((N, T, K), (N, T, K), (N, T, V), (N, K, V)))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = random.uniform(size=(N, T)) if beta is None else beta
    log_decay = -random.exponential(0.5, (N, T)) if log_decay is None else log_decay
    gates = (np.broadcast_to(gate, (N, T)) for gate in (beta, log_decay))
    return tuple(jnp.asarray(a, dtype) for a in (q, k, v, *gates, state))


def results(function, arguments, **options):
    """The results, and the gradients of a sum that weighs them all."""

    def loss(arguments):
        y, state = function(*arguments, **options)
        return jnp.sin(y).sum() + (state * jnp.arange(state.size).reshape(state.shape)).sum(), (y, state)

    (_, values), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments)
    return values, gradients


def difference(a, b) -> float:
    """The largest difference of two trees, relative to each leaf of the second."""
    errors = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-3), a, b)
    return max(jax.tree.leaves(errors))


DECAYS = {"drawn": None, "1": 0.0, "0": -np.inf, "0 and 1": np.where(np.arange(11) % 3 == 1, -np.inf, 0.0)}


@pytest.fixture
def small_groups(monkeypatch):
    """Several groups of two chunks, so that states are handed from group to group."""
    monkeypatch.setattr(chunked, "GROUP_TOKENS", 2 * CHUNK)


@pytest.mark.usefixtures("float64", "small_groups")
@pytest.mark.parametrize("T", [1, 3, 4, 11, 24])
def test_chunks_equal_the_recurrence(T):
    arguments = problem(T)
    expected = results(reference.delta_rule, arguments)
    assert difference(results(delta_rule, arguments, chunk_size=CHUNK), expected) < 1e-9


@pytest.mark.usefixtures("float64", "small_groups")
@pytest.mark.parametrize("beta", [None, 0.0, 1.0])
@pytest.mark.parametrize("decay", DECAYS)
def test_gates_at_their_extremes(decay, beta):
    arguments = problem(11, DECAYS[decay], beta)
    ours, expected = results(delta_rule, arguments, chunk_size=CHUNK), results(reference.delta_rule, arguments)
    assert difference(ours[0], expected[0]) < 1e-9
    # The logarithm of a decay of 0 has no gradient: that of the decay itself is not asked for.
    (q_bar, k_bar, v_bar, beta_bar, decay_bar, state_bar), others = ours[1], expected[1]
    assert difference((q_bar, k_bar, v_bar, beta_bar, state_bar), (*others[:4], others[5])) < 1e-9
    assert jnp.isfinite(decay_bar).all()


def test_the_same_key_again_and_again_is_solved_precisely():
    """All keys alike, beta 1, no decay: the worst case of an inverse by powers of a triangular matrix."""
    q, k, v, *gates, state = problem(64, 0.0, 1.0, dtype=np.float32)
    arguments = (q, jnp.broadcast_to(k[:, :1], k.shape), v, *gates, state)
    assert difference(delta_rule(*arguments, chunk_size=64), reference.delta_rule(*arguments)) < 1e-5


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("Q", [1, 2, 3, 8, 13])
def test_the_inverse(Q):
    lower = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, Q, Q)))
    expected = np.linalg.inv(np.eye(Q) + np.tril(lower, -1))
    np.testing.assert_allclose(chunked.inverse_of_unit_lower(lower), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("float64", "small_groups")
def test_a_tangent_can_be_differentiated_in_reverse():
    """As the exact meta-gradient does."""
    arguments, directions = problem(11), problem(11, seed=1)

    def along(function, **options):
        def directional(arguments):
            return jax.jvp(lambda *a: function(*a, **options), arguments, directions)[1]

        return results(lambda *arguments: directional(arguments), arguments)

    assert difference(along(delta_rule, chunk_size=CHUNK), along(reference.delta_rule)) < 1e-9


@pytest.mark.usefixtures("float64", "small_groups")
@pytest.mark.parametrize("wrong", ["the token's own decay twice", "tokens correct each other again"])
def test_a_wrong_variant_is_noticed(wrong, monkeypatch):
    arguments = problem(24)
    expected = results(reference.delta_rule, arguments)
    if "twice" in wrong:
        right = chunks.segment_decay
        monkeypatch.setattr(chunked, "segment_decay", lambda sums: right(sums) * jnp.exp(sums)[..., :1, :1])
    else:
        inverse = chunked.inverse_of_unit_lower
        with_itself = lambda lower: inverse(lower) @ (jnp.eye(CHUNK) + inverse(lower)) / 2  # noqa: E731
        monkeypatch.setattr(chunked, "inverse_of_unit_lower", with_itself)
    assert not difference(results(delta_rule, arguments, chunk_size=CHUNK), expected) < 1e-2


def test_bfloat16_is_finite_over_32768_tokens():
    T, random = 32768, np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, T, width)), jnp.bfloat16) for width in (2, 2, 4))
    k = (k / jnp.linalg.norm(k.astype(jnp.float32), axis=-1, keepdims=True)).astype(jnp.bfloat16)
    beta, decays = random.uniform(size=(1, T)), -random.exponential(1e-4, (1, T))
    gates = (jnp.asarray(gate, jnp.float32) for gate in (beta, decays))
    (o, state), gradients = results(delta_rule, (q, k, v, *gates, jnp.zeros((1, 2, 4))), chunk_size=64)
    assert o.dtype == state.dtype == jnp.float32
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves((o, state, gradients)))
