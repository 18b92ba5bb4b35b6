"""Window attention with sinks: the same by every way to run it, and equal to a dense program written from its words."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.inference.conftest import (
    assert_read_in_any_way,
    learning_model,
)
from tests.inner.conftest import b
from tests.inner.test_exact import assert_equal, gradients
from tests.test_own_mixer import divided
from tests.tiny_run import tiny_run
from ttt_e2e.config import from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.model.mixers import Context, window
from ttt_e2e.model.mixers.attention import Attention
from ttt_e2e.model.passes import DualPass, Pass
from ttt_e2e.model.rope import rotate

T = 6 * b
# Windows shorter and longer than a mini-batch of 4; sinks that one mini-batch holds, and that two do.
CASES = {"k<b": {"sliding_window": 3, "attention_sinks": 2}, "S>b": {"sliding_window": 6, "attention_sinks": 5}}


def mixer_of(**fields):
    model = learning_model(num_hidden_layers=2, num_fast_blocks=1, **fields).merge()
    return jax.tree.map(lambda a: a[0], model.prefix).mixer


def dense(mixer, x_TD):
    """Attention [T, D] of each query over a whole row of scores, a key at a time."""
    config, (k, S) = mixer.config, (mixer.window, mixer.config.attention_sinks)
    q_NTH, k_GTH, v_GTH = mixer._project(x_TD, Pass())
    R = q_NTH.shape[0] // k_GTH.shape[0]
    out = np.zeros(q_NTH.shape)
    for t in range(len(x_TD)):
        seen = [s for s in range(t + 1) if t - s < k or s < S]
        # How far away: a sink that was left behind no farther than where the window had just left all of them.
        far = np.array([t - s if t - s < k else min(t, S + k - 1) - s for s in seen])
        turned = rotate(q_NTH[:, [t] * len(seen)], jnp.asarray(far), theta=config.rope_theta, style=config.rope_style)
        scores = jnp.einsum("nsh,nsh->ns", turned, jnp.repeat(k_GTH[:, seen], R, 0)) * config.head_dim**-0.5
        out[:, t] = jnp.einsum("ns,nsh->nh", jax.nn.softmax(scores), jnp.repeat(v_GTH[:, seen], R, 0))
    return mixer._output(jnp.asarray(out), Pass())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CASES)
def test_a_whole_sequence_is_as_the_dense_program(name):
    mixer = mixer_of(**CASES[name], num_attention_heads=4, num_key_value_heads=2)
    x_TD = np.random.default_rng(0).normal(size=(T, 8))
    expected = dense(mixer, x_TD)
    np.testing.assert_allclose(mixer.whole(x_TD, Pass(), Context()), expected, rtol=1e-9, atol=1e-12)
    without = Attention.whole(mixer, x_TD, Pass(), Context())  # the control
    k = mixer.window
    np.testing.assert_allclose(without[:k], expected[:k], rtol=1e-9, atol=1e-12)
    assert np.abs(without - expected)[k:].max() > 1e-3


@pytest.fixture(scope="module")
def reference():
    return cache(lambda name: gradients({"gradient": "reference", "clip_norm": 0.5}, **CASES[name]))


@pytest.mark.parametrize(
    ("name", "trajectory", "remat"), [("k<b", "store", "keep"), ("S>b", "segment", "block"), ("k<b", "store", "block")]
)
def test_the_meta_gradient_is_that_of_autodiff(name, trajectory, remat, reference):
    inner = {"clip_norm": 0.5, "trajectory": trajectory, "remat": remat, "segment_length": 2}
    assert_equal(gradients(inner, **CASES[name]), reference(name))


@pytest.mark.parametrize("wrong", ["the sinks have no tangent", "sinks are of the mini-batch before"])
def test_a_wrong_variant_is_noticed(wrong, reference, monkeypatch):
    right = window._overlay

    def overlay(sinks, new, start, count=None):
        if "before" in wrong:
            return sinks
        return right(sinks, jax.lax.stop_gradient(new), start, count)

    monkeypatch.setattr(window, "_overlay", overlay)
    with pytest.raises(AssertionError):
        assert_equal(gradients({"clip_norm": 0.5}, **CASES["k<b"]), reference("k<b"))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CASES)
def test_read_in_pieces_and_decoded_as_at_once_and_a_state_saved(name, tmp_path):
    assert_read_in_any_way(learning_model(**CASES[name]), T, tmp_path)


@pytest.mark.usefixtures("float64")
def test_the_dual_pass_has_the_tangent():
    mixer, random = mixer_of(**CASES["k<b"]), np.random.default_rng(0)
    x_TD, direction_TD = (jnp.asarray(random.normal(size=(2 * b, 8))) for _ in range(2))
    state, context = mixer.empty(2 * b), Context()
    dual_2TD, _ = mixer.extend(jnp.stack([x_TD, direction_TD]), DualPass(), state, context)
    expected = jax.jvp(lambda x_TD: mixer.extend(x_TD, Pass(), state, context)[0], (x_TD,), (direction_TD,))
    np.testing.assert_allclose(dual_2TD, jnp.stack(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_divided_among_eight_devices(token_store):
    dtypes = {"compute_dtype": "float64", "param_dtype": "float64", "initializer_range": 0.3}
    fields = {"num_fast_blocks": 1, "sliding_window": 3, "attention_sinks": 2}
    config = tiny_run(token_store, model={**fields, **dtypes})
    loss, gradient = divided(config, (1, 1))
    other_loss, other = divided(config, (4, 2))
    np.testing.assert_allclose(other_loss, loss, rtol=1e-10)
    errors = jax.tree.map(lambda a, e: np.max(np.abs(a - e)) / np.max(np.abs(e)), other, gradient)
    assert max(jax.tree.leaves(errors)) < 1e-10, errors


def test_sinks_without_a_window_are_refused():
    with pytest.raises(UserError, match=r"config.model.attention_sinks is 4, but it must be 0 where no block has"):
        from_config_dict({"model": {"attention_sinks": 4}})
    model = {"attention_sinks": 4, "mixer": "attention,window", "sliding_window": 8}
    assert from_config_dict({"model": model}).model.attention_sinks == 4
