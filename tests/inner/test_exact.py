"""The exact meta-gradient equals plain autodiff through the inner loop, whatever rebuilds W_i and whatever is kept.

Float64: both are the same sums in other orders, so 1e-10 leaves room for a thousandfold of rounding.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.inner.conftest import BOS, T, b, distinct_tokens, learning_model, read

MASKED_FROM = b + 1  # the targets of the second mini-batch are tokens b + 1 ... 2 b
RATES = (0.3, 0.0)


def gradients(inner: dict, **model) -> list:
    """[(loss, gradient)] at each of RATES, of an objective that weighs every output of the reading."""
    tokens = distinct_tokens()
    tokens[MASKED_FROM : MASKED_FROM + b] = BOS  # a fully masked mini-batch
    weight_T = np.random.default_rng(1).normal(size=T) / 10

    with jax.enable_x64(True):
        made = learning_model(inner=inner, **model)

        @jax.jit
        @jax.value_and_grad
        def objective(params, rate):
            reading = read(made, params, tokens, rate)
            final = sum(jnp.vdot(w, w) for w in jax.tree.leaves(reading.fast))
            return reading.loss + weight_T @ reading.token_nll_T + final

        return [jax.device_get(objective(made.params, rate)) for rate in RATES]


def assert_equal(ours, theirs, tolerance=1e-10):
    for (loss, gradient), (expected_loss, expected) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(loss, expected_loss, rtol=tolerance)
        errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), gradient, expected)
        assert max(jax.tree.leaves(errors)) < tolerance, errors


# Windows of less than, exactly and eight times a mini-batch; clipped and not; one and two fast blocks.
NETWORKS = {
    "k<b, clipped": {"model": {"sliding_window": 3}, "inner": {"clip_norm": 0.1}},
    "k=b, no clip": {"model": {"sliding_window": 4, "num_fast_blocks": 1}, "inner": {"clip_norm": 0.0}},
    "k=8b, clip": {"model": {"sliding_window": 32}, "inner": {"clip_norm": 1.0}},
    "full attention": {"model": {"sliding_window": 0, "num_fast_blocks": 3, "tie_word_embeddings": True}, "inner": {}},
}
POLICIES = tuple(itertools.product(("store", "segment"), ("keep", "mini_batch", "block")))
# Every policy with a network, every network with a policy; the rest is slow.
COVER = set(zip(itertools.cycle(NETWORKS), POLICIES))


@pytest.fixture(scope="module")
def reference():
    made = {}

    def get(name: str):
        if name not in made:
            network = NETWORKS[name]
            made[name] = gradients({**network["inner"], "gradient": "reference"}, **network["model"])
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        pytest.param(name, policy, marks=() if (name, policy) in COVER else pytest.mark.slow)
        for name in NETWORKS
        for policy in POLICIES
    ],
)
def test_exact_equals_the_reference(name, policy, reference):
    network = NETWORKS[name]
    trajectory, remat = policy
    inner = {**network["inner"], "trajectory": trajectory, "remat": remat, "segment_length": 2}
    assert_equal(gradients(inner, **network["model"]), reference(name))


ALTERNATING = {"mixer": "window,attention", "num_fast_blocks": 4, "num_hidden_layers": 4, "tie_word_embeddings": True}
SEGMENTS = {"mixer": "window,attention,window,window", "num_fast_blocks": 3, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(ALTERNATING, marks=pytest.mark.slow),  # tests/test_own_mixer.py has a period of two mixers, too
        SEGMENTS,
    ],
    ids=["periods", "segments"],
)
def test_block_by_block_with_windows_that_alternate(model):
    """The reverse under "block" walks back through segments, in them through periods, and in these through blocks."""
    ours = gradients({"clip_norm": 0.5, "remat": "block", "trajectory": "segment", "segment_length": 2}, **model)
    assert_equal(ours, gradients({"clip_norm": 0.5, "gradient": "reference"}, **model))


@pytest.mark.parametrize("change", ({"gradient": "first_order"}, {"truncate": 2}))
def test_cut_gradients_are_the_reference_with_constants_in_place(change, reference, monkeypatch):
    """First order: the inner gradient is a constant. Truncated: every second mini-batch's fast weights are."""
    from ttt_e2e.inner import reference as reference_path

    if "gradient" in change:
        constant = lambda gradient, *args: jax.lax.stop_gradient(clip_scale(gradient, *args))  # noqa: E731
        clip_scale, update = reference_path.clip_scale, reference_path.sgd_update
        monkeypatch.setattr(reference_path, "clip_scale", constant)
        monkeypatch.setattr(
            reference_path, "sgd_update", lambda fast, g, rate: update(fast, jax.lax.stop_gradient(g), rate)
        )
    network = NETWORKS["k=8b, clip"]
    expected = gradients({**network["inner"], **change, "gradient": "reference"}, **network["model"])
    monkeypatch.undo()
    ours = gradients({**network["inner"], **change}, **network["model"])
    assert_equal(ours, expected)
    # What is cut matters, but for a learning rate of 0, under which no update depends on anything.
    whole = reference("k=8b, clip")
    difference = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), ours[0][1], whole[0][1])
    assert max(jax.tree.leaves(difference)) > 1e-3


def test_delta_is_the_gradient_at_rounded_updates():
    """bfloat16 rounds the updates by up to 2^-9; the gradient moves accordingly, and comes back at rate 0."""
    exact, delta = gradients({}), gradients({"trajectory": "delta"})
    assert_equal([delta[1]], [exact[1]])
    assert_equal([delta[0]], [exact[0]], tolerance=0.05)
    assert not np.array_equal(delta[0][0], exact[0][0])


@pytest.mark.slow
def test_bfloat16_compute_is_as_near_to_float32_as_the_reference_is():
    """Both round every product to eight bits; the exact path rounds other ones, but no more of them."""

    def gradient(compute_dtype, **inner):
        sizes = {"num_hidden_layers": 2, "num_fast_blocks": 1}
        results = gradients({"clip_norm": 0.5, **inner}, compute_dtype=compute_dtype, param_dtype="float32", **sizes)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(results[0][1])])

    reference_32 = gradient("float32", gradient="reference")
    distance = np.linalg.norm(gradient("bfloat16", gradient="reference") - reference_32)
    assert np.linalg.norm(gradient("bfloat16", remat="keep") - reference_32) <= 1.1 * distance
