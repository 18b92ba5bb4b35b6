"""Optimizers: what they do to which parameters, sharded, and resumed to the bit."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests.tiny_run import tiny_run
from ttt_e2e.checkpoints.progress import load_progress
from ttt_e2e.cluster.mesh import make_mesh, partition_specs, shardings
from ttt_e2e.config import MeshConfig, ModelConfig, OptimizerConfig
from ttt_e2e.model import parameter_traits
from ttt_e2e.model.parameters import parameter_name
from ttt_e2e.runs.metrics import read_metrics
from ttt_e2e.train import loop, optimizers
from ttt_e2e.train.optimizers import learning_rate_schedule, make_optimizer

L, D, F, V = 4, 16, 24, 31
SHAPES = {
    "fast": {"suffix": {"fast_mlp": {"w1": (L, D, F)}}},
    "slow": {
        "embedding": (V, D),
        "head": (D, V),
        "prefix": {"mlp": {"w2": (L, F, D)}, "attention_norm": {"weight": (L, D)}},
        "final_norm": {"weight": (D,)},
    },
}
MODEL = ModelConfig(num_fast_blocks=1, tie_word_embeddings=False)  # has parameters of these names
MATRICES = {"fast.suffix.fast_mlp.w1", "slow.prefix.mlp.w2"}
CONFIG = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, decay_steps=100, clip_norm=0.0)


def random_tree(seed: int):
    random = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32), SHAPES, is_leaf=is_shape)


def by_name(tree) -> dict:
    return {parameter_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def second_update(config: OptimizerConfig, params, gradients, mesh=None) -> dict:
    """{name: update} of the second of two steps."""
    optimizer = make_optimizer(config, params, MODEL, mesh)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
    return by_name(updates)


@pytest.fixture(scope="module")
def trees():
    """Parameters, and the gradients of two steps."""
    return random_tree(0), (random_tree(1), random_tree(2))


def test_muon_orthogonalizes_the_matrix_of_each_block_by_itself(trees):
    params, gradients = trees
    config = OptimizerConfig(**vars(CONFIG) | {"weight_decay": 0.0})
    updates = second_update(config, params, gradients)
    one_block = lambda tree: jax.tree.map(lambda x: x[1:2] if len(x) == L else x, tree)  # noqa: E731
    alone = second_update(config, one_block(params), [one_block(gradient) for gradient in gradients])
    for name in MATRICES:
        np.testing.assert_allclose(updates[name][1], alone[name][0], rtol=1e-4, atol=1e-6)
    for name in MATRICES:
        # Newton-Schulz leaves singular values between 0.6 and 1.3 of one another's mean; the gradients' are far wider.
        values = np.linalg.svd(updates[name], compute_uv=False)
        assert values.max() < 2.5 * values.min()
        gradient_values = np.linalg.svd(by_name(gradients[1])[name], compute_uv=False)
        assert gradient_values.max() > 2.5 * gradient_values.min()  # the control
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(updates[name] ** 2)), 0.2, rtol=0.15)


def test_muon_leaves_embedding_head_and_norms_to_adamw(trees):
    params, gradients = trees
    rate = learning_rate_schedule(CONFIG)
    adamw = optax.adamw(rate, b1=CONFIG.b1, b2=CONFIG.b2, weight_decay=CONFIG.weight_decay)
    state = adamw.init(params)
    for gradient in gradients:
        expected, state = jax.jit(adamw.update)(gradient, state, params)
    expected, updates = by_name(expected), second_update(CONFIG, params, gradients)
    for name, update in updates.items():
        close = np.allclose(update, expected[name], rtol=1e-5, atol=1e-7)
        assert close == (name not in MATRICES), name


@pytest.mark.parametrize("name", sorted(MATRICES))
def test_muon_decays_matrices_by_the_same_weight_decay(name, trees):
    params, gradients = trees
    without = OptimizerConfig(**vars(CONFIG) | {"weight_decay": 0.0})
    decayed = second_update(CONFIG, params, gradients)[name] - second_update(without, params, gradients)[name]
    rate = learning_rate_schedule(CONFIG)(1)
    np.testing.assert_allclose(decayed, -rate * CONFIG.weight_decay * by_name(params)[name], rtol=1e-3, atol=1e-5)


def test_muon_trains_only_what_it_is_told_to(trees):
    params, gradients = trees
    config = OptimizerConfig(**vars(CONFIG) | {"train_only": r"mlp|head"})
    updates, all_updates = second_update(config, params, gradients), second_update(CONFIG, params, gradients)
    for name, update in updates.items():
        trained = "mlp" in name or "head" in name
        np.testing.assert_allclose(update, all_updates[name] if trained else 0, rtol=1e-5, atol=1e-7 if trained else 0)


def test_the_state_of_muon_is_sharded_as_the_parameters_are(trees):
    params, _ = trees
    mesh = make_mesh(MeshConfig(data=4, model=2))
    state = jax.eval_shape(make_optimizer(CONFIG, params, MODEL).init, params)
    specs = by_name(partition_specs(params, mesh, MODEL))
    of_parameters = 0
    for path, spec in by_name(partition_specs(state, mesh, MODEL)).items():
        matches = [name for name in specs if path.endswith(name)]
        assert spec == (specs[matches[0]] if matches else P())
        of_parameters += len(matches)
    assert of_parameters == len(MATRICES) + 2 * (len(specs) - len(MATRICES))  # momentum; two moments


def test_muon_on_a_mesh_makes_the_updates_of_one_device(trees):
    params, gradients = trees
    mesh = make_mesh(MeshConfig(data=4, model=2))
    placed = [jax.device_put(tree, shardings(tree, mesh, MODEL)) for tree in (params, *gradients)]
    on_a_mesh, on_one = second_update(CONFIG, placed[0], placed[1:], mesh), second_update(CONFIG, params, gradients)
    for name, update in on_one.items():
        np.testing.assert_allclose(on_a_mesh[name], update, rtol=1e-4, atol=1e-5)


def test_state_that_is_of_no_parameter_is_whole_on_every_device():
    mesh = make_mesh(MeshConfig(data=4, model=2))
    assert partition_specs({"coefficients": jnp.zeros((8, 8))}, mesh, MODEL) == {"coefficients": P()}
    with pytest.raises(ValueError, match=r"slow.gate is no parameter of the model"):
        partition_specs({"slow": {"gate": jnp.zeros((8, 8))}}, mesh, MODEL)


def test_adamw_keeps_the_state_that_checkpoints_have():
    params = random_tree(0)
    ours = make_optimizer(OptimizerConfig(decay_steps=100), params, MODEL).init(params)
    schedule = learning_rate_schedule(OptimizerConfig(decay_steps=100))
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)).init(params)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_parameter_that_does_not_decay_and_one_with_a_rate_of_its_own(name, trees, monkeypatch):
    params, gradients = trees
    config = OptimizerConfig(**vars(CONFIG) | {"name": name})
    without_decay = OptimizerConfig(**vars(config) | {"weight_decay": 0.0})
    plain, undecayed = (second_update(c, params, gradients) for c in (config, without_decay))
    changed = dict(parameter_traits(MODEL))
    still, fast = ("slow.embedding", "slow.prefix.mlp.w2"), "slow.final_norm.weight"
    for parameter in still:
        changed[parameter] = changed[parameter]._replace(decays=False)
    changed[fast] = changed[fast]._replace(rate=5.0)
    monkeypatch.setattr(optimizers, "parameter_traits", lambda model: changed)
    for parameter, update in second_update(config, params, gradients).items():
        expected = undecayed[parameter] if parameter in still else plain[parameter] * (5 if parameter == fast else 1)
        np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-6)
        assert parameter not in still or not np.allclose(update, plain[parameter], rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_fast_mlps_may_learn_at_a_rate_of_their_own(name, trees):
    params, gradients = trees
    config = OptimizerConfig(**vars(CONFIG) | {"name": name})
    faster = OptimizerConfig(**vars(config) | {"fast_rate": 5.0})
    plain = second_update(config, params, gradients)
    for parameter, update in second_update(faster, params, gradients).items():
        factor = 5 if parameter == "fast.suffix.fast_mlp.w1" else 1
        np.testing.assert_allclose(update, factor * plain[parameter], rtol=1e-3, atol=1e-6)


def test_muon_on_a_mesh_is_resumed_to_the_bit(token_store, tmp_path):
    config = tiny_run(
        token_store,
        model={"num_hidden_layers": 1},
        optimizer={"name": "muon", "learning_rate": 3e-2},
        train={"num_steps": 8},
        inner={"gradient": "first_order"},  # compiles in less time; the update is the same program
        mesh={"data": 2, "model": 2},
        checkpoint={"every_steps": 4},
        eval={"every_steps": 0},
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    loop.train(config, whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "8")  # as if killed before it was saved
    loop.train(config, resumed)
    losses = [[line["loss"] for line in read_metrics(run / "metrics.jsonl")] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.02
    arrays = [load_progress(run / "checkpoints" / "8")["arrays"] for run in (whole, resumed)]
    assert arrays[0] == arrays[1]  # names, shapes and digests, those of the optimizer's state too
    assert "optimizer.1.inner_states.muon.inner_state.0.trace.fast.suffix.fast_mlp.w1" in arrays[0]
