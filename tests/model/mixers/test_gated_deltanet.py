"""The mixer `gated_deltanet` is the layer of the public implementation. What all mixers do: test_every_mixer.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.model.mixers import golden
from ttt_e2e.config import from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.kernels.delta_rule import chunked
from ttt_e2e.model import abstract_model
from ttt_e2e.model.mixers import gated_deltanet, make_mixer
from ttt_e2e.model.norm import RMSNorm

N, K, V = 2, 12, 20


def make(D: int, parameters: dict, **fields):
    return golden.make_layer(
        "gated_deltanet", D, {"num_heads": N, "head_dim": K, "expand_v": V / K} | fields, parameters
    )


@pytest.fixture(scope="module")
def released():
    """(x, y, layer): the public layer's inputs and outputs, and ours with its parameters."""
    x, y, p = golden.load("gated_deltanet_mixer")
    parameters = {f"w{name}": p[f"{name}_proj.weight"].T for name in "qkvabgo"}
    conv = np.split(p["conv1d.weight"][:, 0], np.cumsum([N * K, N * K]))
    parameters |= {f"conv_{name}": weight for name, weight in zip("qkv", conv)}
    parameters |= {name: p[name] for name in ("A_log", "dt_bias")}
    layer = make(x.shape[-1], parameters, chunk_size=32)
    layer.norm.weight.set_value(jnp.asarray(p["o_norm.weight"]))
    return x, y, layer


def error(released) -> float:
    x, y, layer = released
    return float(np.abs(golden.run(layer, x) - y).max())


def test_it_is_the_public_layer(released):
    assert error(released) < 1e-5


def gate_by_sigmoid(monkeypatch):
    silu, calls = jax.nn.silu, []

    def fourth_is_sigmoid(x):  # the first three are those of the convolutions
        calls.append(x)
        return jax.nn.sigmoid(x) if len(calls) % 4 == 0 else silu(x)

    monkeypatch.setattr(gated_deltanet.jax.nn, "silu", fourth_is_sigmoid)


def norm_weight_plus_1(monkeypatch):
    right = RMSNorm.__call__
    monkeypatch.setattr(RMSNorm, "__call__", lambda self, x: right(self, x) / self.weight[...] * (1 + self.weight[...]))


def gate_before_the_norm(monkeypatch):
    """RMSNorm(o silu(g)), as Mamba-2 has it; the norm hands what it is given to the gate, which is undone there."""
    right, silu, kept = RMSNorm.__call__, jax.nn.silu, []

    def norm(self, o):
        kept.append((self, o))
        return 1.0

    def gate(x):
        if not kept:
            return silu(x)
        norm_layer, o = kept.pop()
        return right(norm_layer, o * silu(x))

    monkeypatch.setattr(RMSNorm, "__call__", norm)
    monkeypatch.setattr(gated_deltanet.jax.nn, "silu", gate)


def beta_squashed_twice(monkeypatch):
    rule = gated_deltanet.delta_rule
    twice = lambda q, k, v, beta, *rest, **options: rule(q, k, v, jax.nn.sigmoid(beta), *rest, **options)  # noqa: E731
    monkeypatch.setattr(gated_deltanet, "delta_rule", twice)


def decay_in_bfloat16(monkeypatch):
    """The sums of the logarithms too, as where the whole layer is cast."""
    cumsum = jnp.cumsum
    rounded = lambda a, axis: cumsum(a.astype(jnp.bfloat16), axis).astype(a.dtype)  # noqa: E731
    monkeypatch.setattr(chunked.jnp, "cumsum", rounded)


@pytest.mark.parametrize(
    "control",
    [gate_by_sigmoid, norm_weight_plus_1, gate_before_the_norm, beta_squashed_twice, decay_in_bfloat16],
)
def test_another_convention_is_seen(control, released, monkeypatch):
    control(monkeypatch)

    assert error(released) > 1e-2


def test_the_widths_of_keys_and_values_are_not_exchanged(released, monkeypatch):
    """Values of other heads: the channels of [T, N V] cut into heads as if they were K wide."""
    heads = gated_deltanet.GatedDeltaNet._heads

    def exchanged(self, x_T):
        return heads(self, x_T).swapaxes(0, 1).reshape(len(x_T), -1, N).transpose(2, 0, 1)

    monkeypatch.setattr(gated_deltanet.GatedDeltaNet, "_heads", exchanged)
    assert error(released) > 1e-2


def test_the_norm_has_an_epsilon_of_its_own(released, monkeypatch):
    x, y, layer = released
    monkeypatch.setattr(layer.norm, "eps", 1e-6)
    assert np.abs(golden.run(layer, x) - y).max() > 1e-5


def test_it_begins_as_the_original_does():
    config = from_config_dict({"model": {"hidden_size": 1024, "num_attention_heads": 4, "mixer": "gated_deltanet"}})
    layer = make_mixer("gated_deltanet", config.model, nnx.Rngs(0))
    assert (layer.num_heads, layer.key_width, layer.value_width) == (3, 256, 512)
    dt = jax.nn.softplus(layer.dt_bias[...])
    assert (dt > 1e-3).all() and (dt < 0.1).all()
    assert (layer.A_log[...] <= np.log(16.001)).all()
    undecayed = {name for name, p in vars(layer).items() if isinstance(p, nnx.Param) and not p.get_metadata()["decays"]}
    assert undecayed == {"A_log", "dt_bias"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 40}, r"head_dim is 40, but it must be a divisor of three quarters of hidden_size 64, unless"),
        ({"head_dim": 64}, r"head_dim is 64, but it must be a divisor of three quarters of hidden_size 64, unless"),
        ({"head_dim": 16, "expand_v": 0.01}, r"expand_v is 0.01, but it must be at least 0.0625"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    model = {"hidden_size": 64, "mixer": "gated_deltanet", "gated_deltanet": fields}
    with pytest.raises(UserError, match=f"^config.model.gated_deltanet.{message}"):
        abstract_model(from_config_dict({"model": model}).model)
