"""The mixer `ttt_kvb` is the released layer without its window attention, and reads, learns and divides as all do.

The layer is written anew here, one step after another as the release has them, around the token-by-token reference.

Shapes: `T` positions, `D` model width, `N` heads, `H` head width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.inference.conftest import assert_same_state
from tests.model.naive import rms_norm, rotate
from tests.model.tiny import TINY
from ttt_e2e.config import from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.kernels.key_value_binding import reference
from ttt_e2e.model import abstract_model
from ttt_e2e.model.mixers import Context, make_mixer
from ttt_e2e.model.mixers.ttt_kvb import BASE_RATE, KeyValueBinding
from ttt_e2e.model.passes import DualPass, Pass
from ttt_e2e.targets.products import matmul_flops

N, CHUNK = 2, 8


def model_config(**fields):
    """D = 8, two heads of the memory with two groups of channels each that rotate."""
    fields = {"num_heads": N, "low_rank": 2, "chunk_size": CHUNK} | fields
    return from_config_dict({"model": TINY | {"head_dim": 2, "mixer": "ttt_kvb", "ttt_kvb": fields}}).model


def make_layer(**fields) -> KeyValueBinding:
    """A layer of which every part matters: no parameter is 0 or 1, and rates are not small."""
    config = model_config(**fields)
    layer, random = make_mixer("ttt_kvb", config, nnx.Rngs(0)), np.random.default_rng(0)
    for _, p in nnx.iter_graph(layer):
        if isinstance(p, nnx.Param):
            p.set_value(p.get_value() + 0.4 * random.normal(size=p.get_value().shape))
    bias = layer.control_bias.get_value().reshape(N, -1)
    layer.control_bias.set_value(bias.at[:, :3].add(6.0).reshape(-1))
    return layer


def inputs(T: int, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(T, 8)))


def silu(x):
    return x / (1 + jnp.exp(-x))


def softplus(x):
    return jnp.log1p(jnp.exp(x))


def naive(layer: KeyValueBinding, x_TD, *, rope=True, gate=silu, norm_first=True):
    """The released layer, head by head; the options make it wrong."""
    p, config = nnx.to_pure_dict(nnx.state(layer, nnx.Param)), layer.config
    T, H, group = len(x_TD), config.hidden_size // N, config.head_dim
    q_TD, k_TD = (silu(x_TD @ p[w] * p["qk_scale"][i] + p["qk_offset"][i]) for i, w in enumerate(("wq", "wk")))
    v_TD = silu(x_TD @ p["wv"])
    controls_TNC = (x_TD @ p["controls"] + p["control_bias"]).reshape(T, N, -1)
    heads = []
    for n in range(N):
        of_head = slice(n * H, (n + 1) * H)
        q_TH, k_TH = (a[:, of_head] for a in (q_TD, k_TD))
        q_TH, k_TH = (a / (jnp.linalg.norm(a, axis=-1, keepdims=True) + 1e-5) for a in (q_TH, k_TH))
        if rope:
            q_TH, k_TH = (
                jnp.concatenate([rotate(a[:, i : i + group], config.rope_theta) for i in range(0, H, group)], axis=-1)
                for a in (q_TH, k_TH)
            )
        w0, w2 = (jnp.eye(H) / 2 + p[f"{w}_in"][n] @ p[f"{w}_out"][n] for w in ("w0", "w2"))
        rates_T3 = softplus(controls_TNC[:, n, :3] + np.log(np.expm1(0.001)))
        momentum_T = 1 / (1 + jnp.exp(-controls_TNC[:, n, 4])) if controls_TNC.shape[-1] == 5 else None
        weights, tokens = (w0, p["w1"][n], w2), (q_TH, k_TH, v_TD[:, of_head], rates_T3, momentum_T)
        y_TH, _ = reference.bind(weights, *tokens, chunk_size=layer.fields.chunk_size)
        scale_T1 = gate(controls_TNC[:, n, 3])[:, None]
        normed = [rms_norm(y, p["norm"]["weight"], 1e-5) for y in (y_TH, y_TH * scale_T1)]
        heads.append(normed[0] * scale_T1 if norm_first else normed[1])
    return jnp.concatenate(heads, axis=-1) @ p["wo"]


def whole(layer: KeyValueBinding, x_TD):
    return layer.whole(x_TD, Pass(), Context())


# ----------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("momentum", [False, True])
def test_the_layer_is_that_of_the_release(momentum):
    """1e-6: the angles of RoPE are rounded to 2^-33 turns a position."""
    layer, x_TD = make_layer(momentum=momentum), inputs(19)
    expected_TD = jax.jit(lambda x_TD: naive(layer, x_TD))(x_TD)
    np.testing.assert_allclose(whole(layer, x_TD), expected_TD, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "wrong", [{"rope": False}, {"gate": jax.nn.sigmoid}, {"norm_first": False}], ids=lambda wrong: next(iter(wrong))
)
def test_a_wrong_layer_is_seen(wrong):
    layer, x_TD = make_layer(), inputs(12)
    wrong_TD = jax.jit(lambda x_TD: naive(layer, x_TD, **wrong))(x_TD)
    assert np.max(np.abs(whole(layer, x_TD) - wrong_TD)) > 1e-2


@pytest.mark.usefixtures("float64")
def test_in_float32_and_bfloat16_it_is_the_same_but_for_rounding():
    layer, x_TD = make_layer(), inputs(19)
    expected_TD = whole(layer, x_TD)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.1)):
        narrow = nnx.clone(layer)
        narrow.config = dataclasses.replace(layer.config, compute_dtype=dtype)
        y_TD = whole(narrow, x_TD.astype(dtype))
        assert y_TD.dtype == dtype
        error = np.max(np.abs(np.asarray(y_TD, float) - expected_TD)) / np.max(np.abs(expected_TD))
        assert error < tolerance


@pytest.mark.usefixtures("float64")
def test_no_token_sees_another_of_its_chunk_or_after():
    layer, T = make_layer(), 19
    reads_TTD = jax.jacrev(lambda x_TD: whole(layer, x_TD).sum(axis=-1))(inputs(T))
    seen_TT = np.any(reads_TTD != 0, axis=-1)
    chunk_T = np.arange(T) // CHUNK
    np.testing.assert_array_equal(seen_TT, (chunk_T[:, None] > chunk_T) | np.eye(T, dtype=bool))


@pytest.mark.usefixtures("float64")
def test_states_say_what_was_read_and_padding_is_no_token():
    layer, x_TD = make_layer(), inputs(19)
    expected_TD = whole(layer, x_TD)
    extend = jax.jit(lambda x_bD, state, start, count: layer.extend(x_bD, Pass(), state, Context(start, count)))
    state, y = layer.empty(0), []
    for start in range(0, 19, 4):
        piece = jnp.pad(x_TD[start : start + 4], ((0, max(0, start + 4 - 19)), (0, 0)), constant_values=3.0)
        y_bD, state = extend(piece, state, start, min(4, 19 - start))
        y.append(y_bD)
    np.testing.assert_allclose(jnp.concatenate(y)[:19], expected_TD, rtol=1e-9)

    decode = jax.jit(lambda x_1D, draft, count: layer.decode(x_1D, Pass(), None, draft, Context(0, count)))
    draft, y = layer.empty(0), []
    for t in range(19):
        y_1D, draft = decode(x_TD[t : t + 1], draft, t)
        y.append(y_1D)
    np.testing.assert_allclose(jnp.concatenate(y), expected_TD, rtol=1e-9)
    assert_same_state(draft, state, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_the_dual_pass_has_the_tangent_and_states_without_one():
    layer, x_TD, direction_TD = make_layer(), inputs(12), inputs(12, seed=2)
    state = layer.extend(inputs(4, seed=3), Pass(), layer.empty(0), Context())[1]
    context = Context(start=4)
    dual_2TD, entry = layer.extend(jnp.stack([x_TD, direction_TD]), DualPass(), state, context)
    expected = jax.jvp(lambda x_TD: layer.extend(x_TD, Pass(), state, context)[0], (x_TD,), (direction_TD,))
    np.testing.assert_allclose(dual_2TD, jnp.stack(expected), rtol=1e-9, atol=1e-12)
    assert_same_state(entry, layer.extend(x_TD, Pass(), state, context)[1], rtol=1e-12)


# -------------------------------------------------------------------------------------------------- its initialisation


def test_it_begins_as_the_release_does():
    D = 64
    fields = {"hidden_size": D, "num_attention_heads": 8, "mixer": "ttt_kvb"}
    config = from_config_dict({"model": fields}).model
    layer = make_mixer("ttt_kvb", config, nnx.Rngs(0))
    tokens, scale_NT = layer._tokens(layer._project(jnp.zeros((3, D)), Pass()), jnp.arange(3))
    np.testing.assert_allclose(jnp.stack(tokens.rates), BASE_RATE, rtol=1e-5)
    np.testing.assert_array_equal(tokens.momentum, 0.5)
    np.testing.assert_array_equal(scale_NT, 0.0)
    w0, w1, w2 = layer._first()
    assert w0.shape == w1.shape == w2.shape == (4, 16, 16)
    assert 0.9 < np.std(w1) * 4 < 1.1
    for w in (w0, w2):  # (gain^2 of the two factors) / sqrt(16) off the diagonal, and 1/2 on it
        np.testing.assert_allclose(np.mean(np.diagonal(w, axis1=1, axis2=2)), 0.5, atol=0.05)
        assert 0.8 < np.std(w - np.eye(16) / 2) * 4 / 0.25 < 1.2


def test_its_size():
    """4 D^2 of projections, D^2 / N of w1, and terms in D."""
    D, H, rank = 1024, 256, 32
    model = {"hidden_size": D, "num_attention_heads": 16, "num_hidden_layers": 1, "mixer": "ttt_kvb"}
    config = from_config_dict({"model": model}).model
    params = abstract_model(config)[1]["slow"]["prefix"]["ttt_kvb"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == 4 * D**2 + D**2 // 4 + 4 * D * rank + (D + 1) * 20 + 4 * D + H


@pytest.mark.usefixtures("float64")
def test_its_flops_are_those_of_its_products():
    """But for products of weights, which are folded here: they are constants."""
    layer, T = make_layer(), 40
    program = jax.jit(lambda x_TD: whole(layer, x_TD)).lower(inputs(T)).compile().as_text()
    assert matmul_flops(program) == pytest.approx(T * layer.flops(T), rel=1e-12)


def test_heads_that_do_not_fit_are_refused():
    for fields in ({"hidden_size": 12, "num_heads": 5}, {"hidden_size": 8, "num_heads": 4}):
        model = TINY | {"mixer": "ttt_kvb", "hidden_size": fields["hidden_size"], "param_dtype": "float32"}
        config = from_config_dict({"model": model | {"ttt_kvb": {"num_heads": fields["num_heads"]}}}).model
        with pytest.raises(
            UserError, match=r"^config.model.ttt_kvb.num_heads is \d, but it must be a number that .* head_dim 4"
        ):
            abstract_model(config)
