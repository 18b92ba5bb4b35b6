"""Differentiating through the inner loop. Shapes: `T` sequence, `b` mini-batch, `V` vocabulary, `D` model width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.inner.conftest import BOS, CLIP_NORM, LEARNING_RATE, T, b, distinct_tokens
from tests.inner.naive_reading import naive_reading
from tests.model import naive


def scaled_head(params, scale: float):
    """Logits, and with them inner gradients, so small that none is clipped, or so large that all are."""
    return {"fast": params["fast"], "slow": {**params["slow"], "head": params["slow"]["head"] * scale}}


def random_direction(tree, seed: int):
    """Of length 1 over all leaves."""
    random = np.random.default_rng(seed)
    direction = jax.tree.map(lambda a: random.normal(size=a.shape), tree)
    length = np.sqrt(inner(direction, direction))
    return jax.tree.map(lambda d: jnp.asarray(d / length), direction)


def inner(tree, other):
    return sum(jnp.vdot(a, o) for a, o in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))


def assert_equals_finite_differences(differentiated, params, tokens_T1, part: str):
    """Of the loss, in random directions of the weights in params[part].

    Central differences of step 1e-5 in float64 are off by 1e-10 of cancellation, and of truncation as much or more.
    """
    _, gradient = differentiated(params, tokens_T1)
    for seed in range(3):
        direction = random_direction(params[part], seed)

        def loss(step, direction=direction):
            moved = jax.tree.map(lambda w, d: w + step * d, params[part], direction)
            reading, _ = differentiated({**params, part: moved}, tokens_T1)
            return reading.loss

        difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
        np.testing.assert_allclose(inner(gradient[part], direction), difference, rtol=1e-6, atol=2e-10)


@pytest.mark.parametrize("part", ["fast", "slow"])
@pytest.mark.parametrize("head_scale, clipped", [(1, "some"), (0.01, "none"), (3, "all")])
def test_equals_finite_differences(reference, part, head_scale, clipped):
    model, tokens_T1 = reference.model, distinct_tokens()
    params = scaled_head(model.params, head_scale)
    norms = naive_reading(
        params, model.config, tokens_T1, windows=[6] * 3, learning_rate=LEARNING_RATE, clip_norm=CLIP_NORM
    ).gradient_norm_M
    num_clipped = sum(norm > CLIP_NORM for norm in norms)
    assert {"none": num_clipped == 0, "some": 0 < num_clipped < len(norms), "all": num_clipped == len(norms)}[clipped]
    assert_equals_finite_differences(reference, params, tokens_T1, part)


@pytest.mark.parametrize("part", ["fast", "slow"])
def test_equals_finite_differences_without_a_clip(reference_without_clip, part):
    params, tokens_T1 = reference_without_clip.model.params, distinct_tokens()
    assert_equals_finite_differences(reference_without_clip, params, tokens_T1, part)


@pytest.mark.parametrize("part", ["fast", "slow"])
def test_equals_finite_differences_with_masked_targets(reference, part):
    tokens_T1 = distinct_tokens()
    tokens_T1[b + 1 : 2 * b + 1] = BOS  # a whole mini-batch
    tokens_T1[3 * b + 1] = BOS
    assert_equals_finite_differences(reference, reference.model.params, tokens_T1, part)


def test_at_rate_0_it_is_the_gradient_of_the_plain_model(reference):
    model, tokens_T1 = reference.model, distinct_tokens()
    _, gradient = reference(model.params, tokens_T1, learning_rate=0)

    @jax.jit
    @jax.grad
    def plain_gradient(params):
        return naive.plain_nll(params, model.config.model, tokens_T1, windows=[6] * 3).mean()

    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-11), gradient, plain_gradient(model.params)
    )


def embedding_gradients(differentiated, tokens_T1, learning_rate):
    """Boolean [T, T]: whether the NLL at each position depends, by its gradient, on the input at each other."""
    params = differentiated.model.params
    depends_TT = []
    for t in range(T):
        _, gradient = differentiated(
            params, tokens_T1, learning_rate=learning_rate, loss_weight=0.0, nll_weight_T=np.eye(T)[t]
        )
        depends_TT.append((gradient["slow"]["embedding"][tokens_T1[:-1]] != 0).any(axis=-1))
    return np.stack(depends_TT)


def test_no_token_is_scored_with_knowledge_of_what_follows_it(reference):
    """And learning reaches every token of earlier mini-batches, however far behind the windows they are."""
    depends_TT = embedding_gradients(reference, distinct_tokens(), LEARNING_RATE)
    query, key = np.arange(T)[:, None], np.arange(T)[None, :]
    np.testing.assert_array_equal(depends_TT, key <= query)


def test_without_learning_a_token_depends_on_its_windows_only(reference):
    depends_TT = embedding_gradients(reference, distinct_tokens(), 0.0)
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    np.testing.assert_array_equal(depends_TT, (distance >= 0) & (distance <= 3 * (6 - 1)))


@pytest.mark.parametrize("learning_rate", [0.0, LEARNING_RATE])
@pytest.mark.parametrize("masked", [slice(0, 0), slice(b + 1, 2 * b + 1), slice(0, T + 1)])
@pytest.mark.parametrize("program", ["reference", "reference_without_clip", "first_order"])
def test_is_finite_with_masked_mini_batches_and_at_rate_0(program, masked, learning_rate, request):
    differentiated = request.getfixturevalue(program)
    tokens_T1 = distinct_tokens()
    tokens_T1[masked] = BOS
    reading, gradient = differentiated(differentiated.model.params, tokens_T1, learning_rate=learning_rate)
    for leaf in jax.tree.leaves((reading, gradient)):
        assert np.isfinite(leaf).all()
    if masked == slice(0, T + 1):
        for leaf in jax.tree.leaves(gradient):
            np.testing.assert_array_equal(leaf, 0)


def test_first_order_differs_by_the_derivative_of_the_updates(reference, first_order):
    params, tokens_T1 = reference.model.params, distinct_tokens()

    def relative_difference(learning_rate):
        reading, exact = reference(params, tokens_T1, learning_rate=learning_rate)
        same_reading, approximate = first_order(params, tokens_T1, learning_rate=learning_rate)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12), same_reading, reading)
        difference = jax.tree.map(lambda a, e: a - e, approximate, exact)
        return float(jnp.sqrt(inner(difference, difference) / inner(exact, exact)))

    assert relative_difference(0.0) < 1e-13
    # Proportional to the rate while that is small.
    assert relative_difference(LEARNING_RATE) > 1e-2
    np.testing.assert_allclose(relative_difference(2e-6) / relative_difference(1e-6), 2, rtol=1e-3)


def test_first_order_takes_the_updates_for_constants(first_order):
    """In the fast weights: as finite differences of a loop that applies the same updates wherever it starts."""
    model, tokens_T1 = first_order.model, distinct_tokens()
    params = model.params
    _, gradient = first_order(params, tokens_T1)
    direction = random_direction(params["fast"], seed=0)

    def loop(step, updates=None):
        fast = jax.tree.map(lambda w, d: w + step * d, params["fast"], direction)
        return naive_reading(
            {**params, "fast": fast},
            model.config,
            tokens_T1,
            windows=[6] * 3,
            learning_rate=LEARNING_RATE,
            clip_norm=CLIP_NORM,
            updates=updates,
        )

    updates = loop(0).updates
    difference = (loop(1e-5, updates).loss - loop(-1e-5, updates).loss) / 2e-5
    np.testing.assert_allclose(inner(gradient["fast"], direction), difference, rtol=1e-6, atol=2e-10)
