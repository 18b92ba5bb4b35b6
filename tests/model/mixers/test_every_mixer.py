"""What every recurrent mixer must do: what tests/test_own_mixer.py asks of a mixer that somebody else wrote.

A new mixer is a line of MIXERS.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.inference.conftest import (
    assert_read_in_any_way,
    assert_same_state,
    learning_model,
)
from tests.inner.conftest import b, distinct_tokens, read
from tests.inner.test_exact import assert_equal, gradients
from tests.test_own_mixer import POLICIES, divided
from tests.tiny_run import tiny_run
from ttt_e2e.model.mixers import Context
from ttt_e2e.model.passes import DualPass, Pass

# Sections of models of width 8, with two heads, and chunks that end within a mini-batch of 4 or last for several.
MIXERS = {
    "mamba2": {"state_size": 3, "head_dim": 8, "chunk_size": 3},
    "gated_deltanet": {"num_heads": 2, "head_dim": 2, "expand_v": 1.5, "chunk_size": 3},
    "ttt_kvb": {"num_heads": 2, "low_rank": 2, "chunk_size": 6},
}
COVER = (("store", "keep"), ("segment", "block"))  # each policy in one of them; the rest is slow
T = 6 * b


def alone(name: str, num_fast_blocks: int = 1) -> dict:
    """A block of the prefix, and one of the suffix."""
    return {"mixer": name, "num_hidden_layers": 2, "num_fast_blocks": num_fast_blocks, name: MIXERS[name]}


def mixed(name: str) -> dict:
    """Below and in a suffix of both kinds, windows between."""
    return alone(name, 2) | {"mixer": f"{name},window", "num_hidden_layers": 4, "sliding_window": 6}


@pytest.fixture(scope="module")
def reference():
    return cache(lambda name: gradients({"gradient": "reference", "clip_norm": 0.5}, **mixed(name)))


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(
    "policy",
    [pytest.param(policy, marks=() if policy in COVER else pytest.mark.slow) for policy in POLICIES],
    ids="/".join,
)
def test_the_meta_gradient_is_that_of_autodiff(policy, name, reference):
    trajectory, remat = policy
    inner = {"clip_norm": 0.5, "trajectory": trajectory, "remat": remat, "segment_length": 2}
    assert_equal(gradients(inner, **mixed(name)), reference(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_the_meta_gradient_of_a_model_of_this_mixer_alone(name):
    expected = gradients({"gradient": "reference", "clip_norm": 0.5}, **alone(name))
    assert_equal(gradients({"clip_norm": 0.5}, **alone(name)), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("fields", [pytest.param(alone, marks=pytest.mark.slow), mixed])
def test_read_in_pieces_and_decoded_as_at_once_and_a_state_saved(fields, name, tmp_path):
    assert_read_in_any_way(learning_model(**fields(name)), T, tmp_path)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MIXERS)
def test_the_state_is_that_after_the_last_token_before_padding(name):
    model = learning_model(**alone(name)).merge()
    mixer = jax.tree.map(lambda a: a[0], model.prefix).mixer
    x_TD = np.random.default_rng(0).normal(size=(3 * b, 8))
    padded_TD = np.concatenate([x_TD[: b + 1], np.full((b - 1, 8), 3.0)])
    extend = jax.jit(lambda x, state, start, count: mixer.extend(x, Pass(), state, Context(start, count)))
    state, y = mixer.empty(0), []
    for start, count, piece in ((0, b, padded_TD[:b]), (b, 1, padded_TD[b:]), (b, b, x_TD[b : 2 * b])):
        y_bD, after = extend(piece, state, start, count)
        state = after if (start, count) != (b, 1) else state
        if (start, count) == (b, 1):
            _, alone_after = mixer.extend(piece[:1], Pass(), state, Context(start))
            assert_same_state(after, alone_after, rtol=1e-9, atol=1e-12)
        else:
            y.append(y_bD)
    np.testing.assert_allclose(np.concatenate(y), mixer.whole(x_TD[: 2 * b], Pass(), Context()), rtol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MIXERS)
def test_the_dual_pass_has_the_tangent(name):
    model = learning_model(**alone(name)).merge()
    mixer, random = jax.tree.map(lambda a: a[0], model.prefix).mixer, np.random.default_rng(0)
    before_TD, x_TD, direction_TD = (jnp.asarray(random.normal(size=(2 * b, 8))) for _ in range(3))
    state, context = mixer.extend(before_TD, Pass(), mixer.empty(0), Context())[1], Context(start=2 * b)
    dual_2TD, entry = mixer.extend(jnp.stack([x_TD, direction_TD]), DualPass(), state, context)
    expected = jax.jvp(lambda x_TD: mixer.extend(x_TD, Pass(), state, context)[0], (x_TD,), (direction_TD,))
    np.testing.assert_allclose(dual_2TD, jnp.stack(expected), rtol=1e-9, atol=1e-12)
    assert_same_state(entry, mixer.extend(x_TD, Pass(), state, context)[1], rtol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MIXERS)
def test_no_token_is_seen_before_it_is_read(name):
    """By gradients: no NLL depends on the embedding of a token after those that it is predicted from."""
    model, tokens = learning_model(**mixed(name)), distinct_tokens()

    def nll_T(embedding):
        slow = model.params["slow"] | {"embedding": embedding}
        return read(model, model.params | {"slow": slow}, tokens, 0.3).token_nll_T

    embedding = model.params["slow"]["embedding"]
    depends = np.abs(jax.jit(jax.jacrev(nll_T))(embedding)).sum(-1)[:, tokens[:-1]]  # [predicted at, token at]
    assert not np.triu(depends, 1).any()
    assert (np.diag(depends) > 0).all() and depends[-1, 0] > 0


@pytest.fixture(scope="module")
def divided_over(token_store):
    """(mixer, shape of the mesh) -> loss and gradient of a batch of a tiny run whose mixers have two heads."""
    dtypes = {"compute_dtype": "float64", "param_dtype": "float64", "initializer_range": 0.3}
    fields = {
        "mamba2": {"state_size": 4, "head_dim": 16, "chunk_size": 8},
        "gated_deltanet": {"num_heads": 2, "head_dim": 4, "chunk_size": 8},
        "ttt_kvb": {"num_heads": 2, "low_rank": 4, "chunk_size": 16},
    }

    def over(name, mesh_shape):
        model = {"mixer": name, "num_fast_blocks": 1, name: fields[name], **dtypes}
        with jax.enable_x64(True):
            return divided(tiny_run(token_store, model=model), mesh_shape)

    return cache(over)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("mesh_shape", [(4, 2), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_divided_among_eight_devices(mesh_shape, name, divided_over):
    """Over `model` 2 devices divide the 2 heads; 4 do not, and all have both."""
    (loss, gradient), (other_loss, other) = divided_over(name, (1, 1)), divided_over(name, mesh_shape)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-10)
    errors = jax.tree.map(lambda a, e: np.max(np.abs(a - e)) / np.max(np.abs(e)), other, gradient)
    assert max(jax.tree.leaves(errors)) < 1e-10, errors
