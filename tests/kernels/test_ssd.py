"""SSD by chunks equals the recurrence. Shapes: `N` heads, `T` tokens, `H` head width, `S` state width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_e2e.kernels import chunks
from ttt_e2e.kernels.ssd import chunked, reference, ssd

N, H, S, CHUNK = 2, 3, 5, 4


def problem(T: int, log_decay=None, dtype=np.float64, seed: int = 0):
    """Inputs, decays, B, C and a state that is not zero."""
    random = np.random.default_rng(seed)
    x, B, C, state = (random.normal(size=size) for size in ((N, T, H), (T, S), (T, S), (N, H, S)))
    if log_decay is None:
        log_decay = -random.exponential(0.5, (N, T))
    return tuple(jnp.asarray(a, dtype) for a in (x, np.broadcast_to(log_decay, (N, T)), B, C, state))


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
    expected = results(reference.ssd, arguments)
    assert difference(results(ssd, arguments, chunk_size=CHUNK), expected) < 1e-9


@pytest.mark.usefixtures("float64", "small_groups")
@pytest.mark.parametrize("decay", DECAYS)
def test_decays_at_their_extremes(decay):
    arguments = problem(11, DECAYS[decay])
    ours, expected = results(ssd, arguments, chunk_size=CHUNK), results(reference.ssd, arguments)
    assert difference(ours[0], expected[0]) < 1e-9
    # The logarithm of a decay of 0 has no gradient: that of the decay itself is not asked for.
    x_bar, decay_bar, *others = ours[1]
    expected_x_bar, _, *expected_others = expected[1]
    assert difference((x_bar, *others), (expected_x_bar, *expected_others)) < 1e-9
    assert jnp.isfinite(decay_bar).all()


@pytest.mark.usefixtures("float64", "small_groups")
def test_a_tangent_can_be_differentiated_in_reverse():
    """As the exact meta-gradient does."""
    arguments, directions = problem(11), problem(11, seed=1)

    def along(function, **options):
        def directional(arguments):
            return jax.jvp(lambda *a: function(*a, **options), arguments, directions)[1]

        return results(lambda *arguments: directional(arguments), arguments)

    assert difference(along(ssd, chunk_size=CHUNK), along(reference.ssd)) < 1e-9


@pytest.mark.usefixtures("float64", "small_groups")
@pytest.mark.parametrize("wrong", ["the token's own decay twice", "no mask before exp"])
def test_a_wrong_variant_is_noticed(wrong, monkeypatch):
    arguments = problem(24, -50.0 if wrong == "no mask before exp" else None)
    expected = results(reference.ssd, arguments)

    def twice(since_start):
        return chunks.segment_decay(since_start) * jnp.exp(since_start - jnp.roll(since_start, 1))[..., None]

    def unmasked(since_start):
        sums = since_start[..., :, None] - since_start[..., None, :]
        return jnp.exp(sums) * jnp.tril(jnp.ones(sums.shape[-2:]))

    right = difference(results(ssd, arguments, chunk_size=24), expected)
    monkeypatch.setattr(chunked, "segment_decay", twice if "twice" in wrong else unmasked)
    assert right < 1e-9 and not difference(results(ssd, arguments, chunk_size=24), expected) < 1e-2


@pytest.mark.parametrize("B", [1, 2])
def test_bfloat16_is_float32_but_for_rounding(B):
    """B sequences, in products so large that a library computes them, which on CPUs does not serve every layout."""
    T, H, S, random = 192, 32, 32, np.random.default_rng(0)
    factors = [random.normal(size=size) for size in ((B, N, T, H), (B, T, S), (B, T, S))]
    log_decay = -jnp.asarray(random.exponential(0.1, (B, N, T)), jnp.float32)

    def run(dtype):
        x, *others = (jnp.asarray(a, dtype) for a in factors)
        every = jax.vmap(lambda *arrays: ssd(*arrays, chunk_size=64))
        return results(every, (x, log_decay, *others, jnp.zeros((B, N, H, S))))[0]

    assert difference(run(jnp.bfloat16), run(jnp.float32)) < 2e-2  # a few roundings, each of at most 2^-8


def test_bfloat16_is_finite_over_32768_tokens():
    T, random = 32768, np.random.default_rng(0)
    x, B, C = (jnp.asarray(random.normal(size=size), jnp.bfloat16) for size in ((1, T, 2), (T, 2), (T, 2)))
    decays = -jnp.asarray(random.exponential(1e-4, (1, T)), jnp.float32)
    (y, state), gradients = results(ssd, (x, decays, B, C, jnp.zeros((1, 2, 2))), chunk_size=256)
    assert y.dtype == state.dtype == jnp.float32
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves((y, state, gradients)))
