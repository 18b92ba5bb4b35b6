"""However a step is divided among devices, its loss and gradient are those of one device; and what devices exchange."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.cluster.mesh import BATCH, make_mesh, shardings
from ttt_e2e.config import Config, MeshConfig, from_config_dict
from ttt_e2e.inner import division as division_rules
from ttt_e2e.model import abstract_model
from ttt_e2e.targets.program import collectives
from ttt_e2e.train.policies import prefix_bytes
from ttt_e2e.train.steps import init_state, make_gradient, take_policies

B, T, b = 8, 32, 4
NUM_MINI_BATCHES, NUM_BLOCKS = T // b, 4

# By name: fields of the model. The vocabulary of 31 is divided evenly by no mesh, that of 32 by all.
MODELS = {
    "e2e": {"vocab_size": 32},
    "e2e, 31 tokens": {"vocab_size": 31},
    "full": {"vocab_size": 31, "num_fast_blocks": 0, "sliding_window": 0},
    "full, own head": {"vocab_size": 32, "num_fast_blocks": 0, "sliding_window": 0, "tie_word_embeddings": False},
    "e2e, own head, narrow": {"vocab_size": 31, "tie_word_embeddings": False, "sliding_window": 2},
    "e2e, grouped queries": {"vocab_size": 32, "num_key_value_heads": 2},
}
# (model, data x model, what the prefix divides). A window of 6 is longer than a part of 4 positions, on 1x8, shorter
# than one of 16; one of 2 is fetched from a neighbour. Eight devices do not divide four heads; four do not divide two.
CASES = (
    ("e2e", (8, 1), "auto"),
    pytest.param("e2e", (4, 2), "matrices", marks=pytest.mark.slow),
    ("e2e, 31 tokens", (2, 4), "sequence"),
    ("e2e", (1, 8), "sequence"),
    ("e2e, own head, narrow", (4, 2), "sequence"),
    pytest.param("e2e, 31 tokens", (1, 8), "matrices", marks=pytest.mark.slow),
    ("e2e, grouped queries", (2, 4), "matrices"),
    pytest.param("full", (8, 1), "auto", marks=pytest.mark.slow),
    pytest.param("full", (4, 2), "matrices", marks=pytest.mark.slow),
    ("full", (2, 4), "sequence"),
    ("full, own head", (1, 8), "sequence"),
)


def make_config(name: str, mesh=(1, 1), prefix: str = "auto", dtype: str = "float64", **train) -> Config:
    model = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": NUM_BLOCKS,
        "num_attention_heads": 4,
        "head_dim": 4,
        "sliding_window": 6,
        "num_fast_blocks": 1,
        "initializer_range": 0.3,
        "compute_dtype": dtype,
        "param_dtype": dtype,
    }
    inner = {"mini_batch_size": b, "learning_rate": 0.3, "clip_norm": 0.5, "trajectory": "store", "remat": "mini_batch"}
    train = {"seq_len": T, "global_batch_size": B} | train
    shape = {"data": mesh[0], "model": mesh[1], "prefix": prefix}
    sections = {"model": model | MODELS[name], "inner": inner, "train": train, "mesh": shape, "data": {"bos_id": 1}}
    return from_config_dict(sections)


def loss_and_gradient(config: Config):
    """Of the first batch, the weights of norms moved from 1, so that each has its own gradient."""
    program, params, tokens = gradient_program(config)
    return jax.device_get(program(params, tokens))


def gradient_program(config: Config):
    mesh = make_mesh(config.mesh)
    _, shapes = abstract_model(config.model)
    placed = shardings(shapes, mesh, config.model)
    params = jax.tree.map(
        lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape, w.dtype), initial_params(config)
    )
    taken = take_policies(config, mesh)
    gradient = make_gradient(taken.config, mesh, taken.division)
    rate = jnp.asarray(config.inner.learning_rate, config.model.compute_dtype)
    program = jax.jit(
        lambda params, tokens: gradient(params, tokens, rate), out_shardings=(NamedSharding(mesh, P()), placed)
    )
    shape = (config.train.global_batch_size, T + 1)
    tokens = np.random.default_rng(0).integers(1, config.model.vocab_size, shape).astype(np.int32)
    return program, jax.device_put(params, placed), jax.device_put(tokens, NamedSharding(mesh, BATCH))


def initial_params(config: Config):
    return jax.jit(lambda: init_state(config, optax.identity()).params)()


@cache
def of_one_device(name: str):
    return loss_and_gradient(make_config(name))


def worst(ours, expected) -> float:
    """The largest difference, in terms of the largest element of its leaf."""
    differences = jax.tree.map(lambda a, e: np.max(np.abs(a - e)) / np.max(np.abs(e)), ours, expected)
    return max(jax.tree.leaves(differences))


@pytest.mark.parametrize(("name", "mesh", "prefix"), CASES)
def test_every_mesh_gives_the_loss_and_gradient_of_one_device(name, mesh, prefix, float64):
    assert worst(loss_and_gradient(make_config(name, mesh, prefix)), of_one_device(name)) < 1e-10


def test_accumulated_gradients_are_those_of_the_batch(float64):
    config = make_config("e2e", (4, 2), global_batch_size=8, accumulation_steps=2)
    assert worst(loss_and_gradient(config), of_one_device("e2e")) < 1e-10


def test_a_gradient_that_is_not_added_up_would_be_seen(float64, monkeypatch):
    monkeypatch.setattr(division_rules.Leaf, "unsummed", ())
    assert worst(loss_and_gradient(make_config("e2e", (4, 2), "sequence")), of_one_device("e2e")) > 1e-3


# ---- what devices exchange


def mesh_shape(mesh) -> dict[str, int]:
    return {"data": mesh[0], "model": mesh[1]}


def gathered_in_loops(text: str, mesh) -> list[str]:
    """What a program moves while it reads mini-batches, but for sums of hidden states over the model axis."""
    often = [c for c in collectives(text, mesh_shape(mesh)) if c.times > NUM_BLOCKS]
    return [f"{c.times} x {c.kind} over {c.axis}" for c in often if (c.kind, c.axis) != ("all-reduce", "model")]


@pytest.mark.parametrize(
    ("name", "mesh", "prefix"),
    (
        ("e2e", (8, 1), "auto"),
        ("e2e", (2, 4), "sequence"),
        ("e2e, 31 tokens", (4, 2), "matrices"),
        ("full", (4, 2), "sequence"),
    ),
)
def test_a_step_gathers_nothing_in_the_loop_over_mini_batches(name, mesh, prefix):
    config = make_config(name, mesh, prefix, dtype="float32")
    program, params, tokens = gradient_program(config)
    text = program.lower(params, tokens).compile().as_text()
    assert not gathered_in_loops(text, mesh)
    received = sum(c.received_bytes for c in collectives(text, mesh_shape(mesh)) if "data" in c.axis)
    stored = sum(w.size * w.dtype.itemsize for w in jax.tree.leaves(params)) / mesh[1]
    # Forwards, again in reverse, and the gradients: every weight three times at most, and what is looked up.
    looked_up = 4 * (B // mesh[0]) * T * config.model.hidden_size * 4
    assert 0 < received <= 3 * stored + looked_up


def test_a_loop_that_gathers_is_seen():
    mesh = make_mesh(MeshConfig(data=4, model=2))

    def on_a_device(w):
        def step(total, _):
            return total + jax.lax.all_gather(w * total.sum(), "data", axis=0, tiled=True), None

        return jax.lax.scan(step, jnp.ones((8, 4)), None, length=NUM_MINI_BATCHES)[0]

    program = jax.jit(jax.shard_map(on_a_device, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False))
    text = program.lower(jax.ShapeDtypeStruct((8, 4), jnp.float32)).compile().as_text()
    assert gathered_in_loops(text, (4, 2)) == [f"{NUM_MINI_BATCHES} x all-gather over data"]


@pytest.mark.parametrize("prefix", ("sequence", "matrices"))
def test_bytes_are_counted_as_the_compiled_prefix_moves_them(prefix):
    """The count by which "auto" decides; but for hidden states that are put together once, and embeddings."""
    config = make_config("e2e", (1, 4), prefix, dtype="float32", global_batch_size=1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_hidden_layers=13))
    program, params, tokens = gradient_program(config)
    text = program.lower(params, tokens).compile().as_text()
    a_block_each = (11, 12)  # times; XLA takes one out of a loop
    moved = sum(c.received_bytes for c in collectives(text, mesh_shape((1, 4))) if c.times in a_block_each)
    counted = prefix_bytes(config, 1, 4, prefix)
    assert 0.7 * counted < moved < 1.1 * counted
