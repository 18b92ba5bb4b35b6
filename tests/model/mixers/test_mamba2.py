"""The mixer `mamba2` is the layer of the public implementation. What all mixers do is in test_every_mixer.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.model.mixers import golden
from ttt_e2e.config import from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.model import abstract_model
from ttt_e2e.model.mixers import make_mixer, mamba2
from ttt_e2e.model.mixers.mamba2 import Mamba2
from ttt_e2e.targets.products import matmul_flops

FIELDS = {"state_size": 16, "head_dim": 8, "chunk_size": 32}
INNER, S = 64, 16


@pytest.fixture(scope="module")
def released():
    """(x, y, layer): the public layer's inputs and outputs, and ours with its parameters."""
    x, y, p = golden.load("mamba2_mixer")
    z, x_in, bc, dt = np.split(p["in_proj.weight"].T, np.cumsum([INNER, INNER, 2 * S]), axis=1)
    conv, conv_bias = p["conv1d.weight"][:, 0], p["conv1d.bias"]
    parameters = {
        "wz": z,
        "wx": x_in,
        "wbc": bc,
        "wdt": dt,
        "wo": p["out_proj.weight"].T,
        "norm_weight": p["norm.weight"],
    }
    parameters |= {"conv_x": conv[:INNER], "conv_bc": conv[INNER:], "dt_bias": p["dt_bias"], "A_log": p["A_log"]}
    parameters |= {"conv_x_bias": conv_bias[:INNER], "conv_bc_bias": conv_bias[INNER:], "skip": p["D"]}
    return x, y, golden.make_layer("mamba2", x.shape[-1], FIELDS, parameters)


def error(released) -> float:
    x, y, layer = released
    return float(np.abs(golden.run(layer, x) - y).max())


def test_it_is_the_public_layer(released):
    assert error(released) < 1e-5


def gate_by_sigmoid(monkeypatch):
    silu, calls = jax.nn.silu, []

    def third_is_sigmoid(x):  # the first two are those of the convolutions
        calls.append(x)
        return jax.nn.sigmoid(x) if len(calls) % 3 == 0 else silu(x)

    monkeypatch.setattr(mamba2.jax.nn, "silu", third_is_sigmoid)


def norm_weight_plus_1(monkeypatch):
    right = Mamba2._normed
    monkeypatch.setattr(
        Mamba2, "_normed", lambda self, y: right(self, y) / self.norm_weight[...] * (1 + self.norm_weight[...])
    )


def gate_after_the_norm(monkeypatch):
    """The norm of y alone, times the gate."""
    monkeypatch.setattr(Mamba2, "_normed", lambda self, gated: gated * _scale_of_ungated(self))

    def _scale_of_ungated(self):
        return jax.lax.rsqrt(jnp.mean(kept[-1] ** 2, -1, keepdims=True) + 1e-5) * self.norm_weight[...]

    kept, ssd = [], mamba2.ssd

    def keeping(x, *arguments, **options):
        y, state = ssd(x, *arguments, **options)
        kept.append(y.swapaxes(0, 1).reshape(y.shape[1], -1))
        return y, state

    monkeypatch.setattr(mamba2, "ssd", keeping)


def decay_in_bfloat16(monkeypatch):
    """The product of the decays so far, each rounded: 75 tokens are enough to see it."""
    ssd = mamba2.ssd

    def rounded(x, log_decay, *arguments, **options):
        decay = jnp.exp(log_decay).astype(jnp.bfloat16)
        return ssd(x, jnp.log(decay.astype(jnp.float32)), *arguments, **options)

    monkeypatch.setattr(mamba2, "ssd", rounded)


def b_and_c_exchanged(monkeypatch):
    ssd = mamba2.ssd
    monkeypatch.setattr(mamba2, "ssd", lambda x, decay, B, C, *rest, **options: ssd(x, decay, C, B, *rest, **options))


@pytest.mark.parametrize(
    "control", [gate_by_sigmoid, norm_weight_plus_1, gate_after_the_norm, decay_in_bfloat16, b_and_c_exchanged]
)
def test_another_convention_is_seen(control, released, monkeypatch):
    control(monkeypatch)
    assert error(released) > 1e-2


def test_it_begins_as_the_original_does():
    config = from_config_dict({"model": {"hidden_size": 256, "num_attention_heads": 4, "mixer": "mamba2"}}).model
    layer = make_mixer("mamba2", config, nnx.Rngs(0))
    assert layer.num_heads == 8 and layer.empty(0).ssm.shape == (8, 64, 128)
    dt = jax.nn.softplus(layer.dt_bias[...])
    assert (dt > 1e-3).all() and (dt < 0.1).all()
    A = jnp.exp(layer.A_log[...])
    assert (A >= 1).all() and (A <= 16.001).all()
    assert 0.4 < jnp.abs(layer.conv_x[...]).max() <= 0.5
    undecayed = {name for name, p in vars(layer).items() if isinstance(p, nnx.Param) and not p.get_metadata()["decays"]}
    assert undecayed == {"A_log", "dt_bias", "skip"}


def test_its_flops_are_those_of_its_products():
    """At one chunk: all of its scores are computed, of which half are masked; and the convolutions are sums."""
    x, _, _ = golden.load("mamba2_mixer")
    _, T, D = x.shape
    layer = golden_like(D, chunk_size=128)
    program = jax.jit(lambda x: golden.run(layer, x)).lower(x[:1]).compile().as_text()
    N, masked = layer.num_heads, (T - 1) / 2 * 2 * (S + INNER)
    convolutions = 2 * 4 * (INNER + 2 * S)
    states = 2 * (2 * 2 * INNER * S) / T  # the two states of the group
    assert matmul_flops(program) / T == pytest.approx(layer.flops(T) + masked - convolutions + states, rel=0.05), N


def golden_like(D: int, **fields):
    config = from_config_dict(
        {"model": {"hidden_size": D, "num_attention_heads": 2, "mixer": "mamba2", "mamba2": FIELDS | fields}}
    )
    return make_mixer("mamba2", config.model, nnx.Rngs(0))


def test_a_head_width_that_does_not_fit_is_refused():
    config = from_config_dict({"model": {"hidden_size": 48, "mixer": "mamba2", "mamba2": {"head_dim": 36}}}).model
    with pytest.raises(
        UserError, match=r"^config.model.mamba2.head_dim is 36, but it must be a divisor of the inner width 96"
    ):
        abstract_model(config)
