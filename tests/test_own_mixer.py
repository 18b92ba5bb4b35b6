"""A mixer in one file: everything that a user gets for a class and a line that registers it.

The class is also the example of docs/mixers.md.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.inference.conftest import (
    assert_read_in_any_way,
    learning_model,
    reader_of,
)
from tests.inner.conftest import b
from tests.inner.test_exact import assert_equal, gradients
from tests.tiny_run import tiny_run
from ttt_e2e.cluster.mesh import BATCH, make_mesh, shardings
from ttt_e2e.config import MIXER_SECTIONS, MIXERS, Config, default_config, from_config_dict, to_dict, validation
from ttt_e2e.config.fields import field
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.report import write_report
from ttt_e2e.flags import override
from ttt_e2e.model import abstract_model, mixers
from ttt_e2e.model.mixers import Mixer, base, register
from ttt_e2e.model.parameters import vector
from ttt_e2e.train.loop import train
from ttt_e2e.train.steps import init_state, make_gradient, take_policies

# -------------------------------------------------------------------------------------- the mixer, as in docs/mixers.md


@dataclass(frozen=True)
class MovingAverageConfig:
    """Fields of the moving average: `config.model.ema`."""

    slowest_decay: float = field(3.0, "initial decay, before the sigmoid, of the channel that forgets least.", least=0)


class MovingAverage(Mixer):
    """Exponential moving average of each channel: s_t = a s_{t-1} + (1 - a) x_t, with a learned decay a."""

    label = "ema"

    def __init__(self, config, rngs):
        self.config = config
        slowest = config.section("ema").slowest_decay
        self.decay = vector(jnp.linspace(0.0, slowest, config.hidden_size), config)  # before the sigmoid

    def whole(self, x_TD, compute, context):
        return self.extend(x_TD, compute, self.empty(0), context)[0]

    def extend(self, x_bD, compute, state_D, context):
        def average(x_bD, state_D):
            a_D = jax.nn.sigmoid(self.decay[...]).astype(x_bD.dtype)

            def step(state_D, x_D):
                state_D = a_D * state_D + (1 - a_D) * x_D
                return state_D, state_D

            last_D, y_bD = jax.lax.scan(step, state_D, x_bD)
            return y_bD, last_D if context.count is None else y_bD[context.count - 1]

        return compute.call(average, x_bD, state_D)

    def decode(self, x_1D, compute, state_D, draft_D, context):
        return self.extend(x_1D, compute, draft_D, context._replace(count=None))

    def empty(self, capacity):
        return jnp.zeros(self.config.hidden_size, self.config.compute_dtype)

    def flops(self, seq_len):
        return 3 * self.config.hidden_size


register("ema", MovingAverage, MovingAverageConfig)

# ----------------------------------------------------------------------------------------------- what one gets for it

MIXED = {"mixer": "window,ema", "num_hidden_layers": 4, "num_fast_blocks": 4, "sliding_window": 6}
ALONE = {"mixer": "ema", "num_hidden_layers": 3, "num_fast_blocks": 2}
POLICIES = tuple(itertools.product(("store", "segment"), ("keep", "mini_batch", "block")))
COVER = (("store", "keep"), ("segment", "block"))  # each of them in one; the rest is slow
T = 6 * b


@pytest.fixture(scope="module")
def reference():
    return gradients({"gradient": "reference", "clip_norm": 0.5}, **MIXED)


@pytest.mark.parametrize(
    "policy",
    [pytest.param(policy, marks=() if policy in COVER else pytest.mark.slow) for policy in POLICIES],
    ids="/".join,
)
def test_the_meta_gradient_is_that_of_autodiff(policy, reference):
    trajectory, remat = policy
    inner = {"clip_norm": 0.5, "trajectory": trajectory, "remat": remat, "segment_length": 2}
    assert_equal(gradients(inner, **MIXED), reference)


def test_a_tangent_that_is_lost_would_be_seen(reference, monkeypatch):
    """The wrong variant: a mixer that does not go through `compute.call`, as if its output had no tangent."""

    def extend(self, x_bD, compute, state_D, context):
        y_bD, entry_D = extend_right(self, x_bD, compute, state_D, context)
        return compute.apply(jax.lax.stop_gradient, y_bD), entry_D

    extend_right = MovingAverage.extend
    monkeypatch.setattr(MovingAverage, "extend", extend)
    with pytest.raises(AssertionError):
        assert_equal(gradients({"clip_norm": 0.5}, **MIXED), reference)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fields", [MIXED | {"num_fast_blocks": 2}, ALONE], ids=["window,ema", "ema"])
def test_read_in_pieces_and_decoded_as_at_once_and_a_state_saved(fields, tmp_path):
    assert_read_in_any_way(learning_model(**fields), T, tmp_path)


def divided(config: Config, mesh_shape) -> tuple:
    """Loss and gradient of a batch on a mesh."""
    config = from_config_dict({**to_dict(config), "mesh": {"data": mesh_shape[0], "model": mesh_shape[1]}})
    mesh = make_mesh(config.mesh)
    placed = shardings(abstract_model(config.model)[1], mesh, config.model)
    params = jax.jit(lambda: init_state(config, _NoOptimizer).params)()
    policies = take_policies(config, mesh)
    gradient = make_gradient(policies.config, mesh, policies.division)
    out = (NamedSharding(mesh, P()), placed)
    program = jax.jit(lambda params, tokens: gradient(params, tokens, jnp.asarray(0.3, jnp.float64)), out_shardings=out)
    tokens = np.random.default_rng(0).integers(1, config.model.vocab_size, (8, config.train.seq_len + 1))
    rows = NamedSharding(mesh, BATCH)
    return jax.device_get(program(jax.device_put(params, placed), jax.device_put(tokens.astype(np.int32), rows)))


class _NoOptimizer:
    @staticmethod
    def init(params):
        return ()


@pytest.mark.usefixtures("float64")
def test_divided_among_eight_devices(token_store):
    dtypes = {"compute_dtype": "float64", "param_dtype": "float64", "initializer_range": 0.3}
    config = tiny_run(token_store, model={"mixer": "ema", "num_fast_blocks": 1, **dtypes})
    loss, gradient = divided(config, (1, 1))
    other_loss, other = divided(config, (4, 2))
    np.testing.assert_allclose(other_loss, loss, rtol=1e-10)
    errors = jax.tree.map(lambda a, e: np.max(np.abs(a - e)) / np.max(np.abs(e)), other, gradient)
    assert max(jax.tree.leaves(errors)) < 1e-10, errors


def test_trained_from_one_config_line_and_reported(token_store, tmp_path):
    config = tiny_run(token_store, model={"num_fast_blocks": 2, "mixer": "window,ema"})
    metrics = train(config, tmp_path / "run")
    assert np.isfinite(metrics["loss"])
    write_report([tmp_path / "run"], tmp_path / "report")
    row = json.loads((tmp_path / "report" / "report.json").read_text())
    assert "window 12, ema" in str(row)


def test_its_fields_are_a_section_of_the_config():
    config = default_config()
    config.model.update(mixer="window,ema", sliding_window=4)
    config.model.ema.slowest_decay = 2
    made = from_config_dict(config)
    assert made.model.section("ema").slowest_decay == 2.0
    assert from_config_dict(to_dict(made)) == made
    assert "ema" not in to_dict(from_config_dict({"model": {"mixer": "attention"}}))["model"]
    assert override(config, ["--config.model.ema.slowest_decay=1"]).model.section("ema").slowest_decay == 1.0
    with pytest.raises(UserError, match=r"unknown config field config.model.ema.slowest: did you mean"):
        override(config, ["--config.model.ema.slowest=1"])
    with pytest.raises(UserError, match=r"config.model.ema.slowest_decay is -1.0, but it must be at least 0"):
        from_config_dict({"model": {"ema": {"slowest_decay": -1}}})
    with pytest.raises(UserError, match=r"config.model.ema has no field 'decay'"):
        from_config_dict({"model": {"ema": {"decay": 1}}})


def test_a_file_of_the_package_declares_its_section(tmp_path, monkeypatch):
    """A mixer among those of the package: nothing imports its file before a config asks for it."""
    declared = """
from dataclasses import dataclass
from ttt_e2e.config.fields import field
from ttt_e2e.model.mixers import register
@dataclass(frozen=True)
class Section:
    width: int = field(3, "a size.", least=1)
register("made_up", None, Section)
"""
    (tmp_path / "made_up.py").write_text(declared)
    monkeypatch.setattr(mixers, "__path__", [*mixers.__path__, str(tmp_path)])
    monkeypatch.setattr(validation, "MIXER_FILES", [*validation.MIXER_FILES, "made_up"])
    monkeypatch.setattr(validation, "MIXER_SECTIONS", dict(MIXER_SECTIONS))
    monkeypatch.setattr(base, "MIXER_SECTIONS", validation.MIXER_SECTIONS)
    for registry, copy in (("MIXERS", [*MIXERS, "made_up"]), ("_MIXERS", dict(base._MIXERS))):
        monkeypatch.setattr(base, registry, copy)
    monkeypatch.setattr(validation, "MIXERS", base.MIXERS)
    recorded = {"model": {"mixer": "made_up", "made_up": {"width": 5}}}  # as of a config.json, first of all
    assert from_config_dict(recorded).model.section("made_up").width == 5
    assert default_config().model.made_up.width == 3


def test_what_a_mixer_cannot_do_is_said(token_store, monkeypatch):
    config = tiny_run(token_store, model={"mixer": "ema"}, mesh={"data": 4, "model": 2, "prefix": "sequence"})
    with pytest.raises(UserError, match=r"'ema', which does not divide the positions.*mesh.prefix must be 'matrices'"):
        take_policies(config, make_mesh(config.mesh))
    monkeypatch.setattr(MovingAverage, "obstacle", lambda self, use: "is once" if use == "twice differentiable" else "")
    with pytest.raises(UserError, match=r"'ema', which is once: config.inner.gradient must be 'first_order'"):
        take_policies(tiny_run(token_store, model={"mixer": "ema"}), make_mesh(config.mesh))
    monkeypatch.undo()
    monkeypatch.delattr(MovingAverage, "decode")
    with pytest.raises(UserError, match=r"config.model.mixer names 'ema', which predicts no single tokens"):
        reader_of(learning_model(**ALONE))


def test_the_documentation_shows_this_class():
    source = Path(__file__).read_text()
    example = source[source.index("@dataclass") : source.index("# ----", source.index("@dataclass"))]
    page = (Path(__file__).parents[1] / "docs" / "mixers.md").read_text()
    assert example.strip() in page
