"""Engram: the released layer in numbers, its hash, and what every part of a model must do with it."""

import dataclasses
import hashlib
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.inference.conftest import (
    assert_read_in_any_way,
    learning_model,
    read_at_once,
    reader_of,
    some_tokens,
)
from tests.inner.conftest import b, distinct_tokens, read
from tests.inner.test_exact import assert_equal, gradients
from tests.test_own_mixer import COVER, POLICIES
from tests.tiny_run import VOCABULARY, tiny_run, write_group
from tests.train.test_division import gradient_program, make_config
from ttt_e2e.checkpoints.params import load_params
from ttt_e2e.cluster.mesh import make_mesh
from ttt_e2e.config import OptimizerConfig, from_config_dict, to_dict
from ttt_e2e.data.store import TokenWriter
from ttt_e2e.errors import UserError
from ttt_e2e.inner.memory import held_bytes
from ttt_e2e.model import Transformer, abstract_model, abstract_transformer, parameter_traits
from ttt_e2e.model.engram import Engram
from ttt_e2e.model.parameters import merge, split
from ttt_e2e.model.passes import Pass
from ttt_e2e.targets.program import collectives
from ttt_e2e.train.flops import model_flops_per_token
from ttt_e2e.train.loop import train
from ttt_e2e.train.optimizers import make_optimizer
from ttt_e2e.train.steps import take_policies

# Shapes: T positions, D model width, E width of all rows of an n-gram, N heads (tables).
GOLDEN = Path(__file__).parents[1] / "data" / "engram" / "engram_layer.npz"
FIELDS = {"blocks": "1", "table_size": 5, "num_heads": 2, "head_dim": 3, "compress_tokens": False}
T = 6 * b


def engram_of(D: int = 8, block: int = 1, **fields) -> Engram:
    model = {"hidden_size": D, "num_attention_heads": 2, "engram": FIELDS | fields}
    return Engram(from_config_dict({"model": model}).model, nnx.Rngs(0), block=block)


# ------------------------------------------------------------------------------------------------ the layer in numbers


def layer_error(change=lambda layer: None) -> float:
    """Largest error of a layer with the parameters of the released one, behind the lookup."""
    with np.load(GOLDEN) as arrays:
        golden = dict(arrays)
    layer = engram_of(24, num_heads=4, head_dim=4)
    layer.wk.set_value(jnp.asarray(golden["p.key_proj.weight"].T))
    layer.wv.set_value(jnp.asarray(golden["p.value_proj.weight"].T))
    layer.conv.set_value(jnp.asarray(golden["p.conv1d.weight"][:, 0]))
    for name in ("key", "query", "conv"):
        getattr(layer, f"{name}_norm").weight.set_value(jnp.asarray(golden[f"p.norm_{name}.weight"]))
    change(layer)

    @jax.vmap
    def run(hidden_TD, e_TE):
        return layer.read_out(hidden_TD, e_TE, Pass(), layer.empty(0).inputs)[0]

    return np.max(np.abs(run(golden["hidden"], golden["embeddings"]) - golden["y"]))


def test_the_layer_is_the_released_one():
    """Float32: its outputs are up to 6, so that 1e-5 is some 15 units in the last place."""
    assert layer_error() < 1e-5


WRONG = {
    "a norm's epsilon": lambda layer: setattr(layer.conv_norm, "eps", 1e-2),
    "keys and values exchanged": lambda layer: setattr(layer, "wk", layer.wv),
    "norms exchanged": lambda layer: setattr(layer, "key_norm", layer.conv_norm),
    "the convolution reversed": lambda layer: layer.conv.set_value(layer.conv.get_value()[:, ::-1]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_layer_would_be_seen(name):
    assert layer_error(WRONG[name]) > 1e-3


def test_another_dilation_would_be_seen(monkeypatch):
    """No s is near 0 in these numbers: they do not see LEAST."""
    monkeypatch.setattr("ttt_e2e.model.engram.DILATION", 2)
    assert layer_error() > 1e-3


# ------------------------------------------------------------------------------------------------------------ the hash


def primes_from(start: int, count: int) -> list[int]:
    """The first primes that are not below `start`, by a sieve."""
    is_prime = [False, False, *[True] * (2 * start + 200)]
    for n in range(2, len(is_prime)):
        if is_prime[n]:
            is_prime[2 * n :: n] = [False] * len(is_prime[2 * n :: n])
    return [n for n in range(start, len(is_prime)) if is_prime[n]][:count]


def expected_rows(tokens: list[int], block: int, sizes: list[int], num_heads: int) -> list[list[int]]:
    """Rows of each token's n-grams in Python's integers, from what docs/engram.md says."""
    ids = [0, 0] + [token + 1 for token in tokens]
    rows = []
    for t in range(2, len(ids)):
        row, start = [], 0
        for number, size in enumerate(sizes):
            length, head = 2 + number // num_heads, number % num_heads
            mixed = 0
            for back in range(length):
                text = f"{block} {length} {head} {back}"
                digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
                multiplier = sum(byte * 256**i for i, byte in enumerate(digest)) | 1
                mixed ^= ids[t - back] * multiplier % 2**32
            row.append(start + mixed % size)
            start += size
        rows.append(row)
    return rows


@pytest.mark.parametrize("block", (0, 2))
def test_rows_are_those_of_an_independent_program(block):
    """Ids up to 2**31 - 2, whose products do not fit in 32 bits; in two pieces."""
    layer = engram_of(blocks="2,0", table_size=1000, num_heads=3, block=block)
    sizes = primes_from(1000, 12)[:6] if block == 0 else primes_from(1000, 12)[6:]
    assert list(layer.sizes) == sizes
    tokens = np.random.default_rng(0).integers(0, [[300], [2**31 - 1]], (2, 40)).reshape(-1).astype(np.int32)
    rows = jax.jit(layer.rows)
    ours = np.concatenate([rows(tokens[:7] + 1, np.zeros(2, np.int32)), rows(tokens[7:] + 1, tokens[5:7] + 1)])
    assert ours.tolist() == expected_rows(tokens.tolist(), block, sizes, 3)


def test_n_grams_spread_over_the_rows_and_no_two_heads_agree():
    """A uniform hash gives counts whose variance is their mean; 0.2 is more than four times its standard error."""
    layer = engram_of(table_size=1000)
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50_000, 50_000).astype(np.int32)
    rows_TN = np.asarray(layer.rows(tokens + 1, np.zeros(2, np.int32))) - np.cumsum([0, *layer.sizes[:-1]])
    for row_T, size in zip(rows_TN.T, layer.sizes):
        counts = np.bincount(row_T, minlength=size)
        assert len(counts) == size and abs(counts.var() / counts.mean() - 1) < 0.2
    alike = rows_TN[:, :1] == rows_TN
    assert (alike[:, 1:].mean(axis=0) < 0.01).all()


def test_alike_tokens_are_one():
    layer = engram_of(compress_tokens=True)
    tokens_T = jnp.asarray([3, 200, 256, 7])
    assert layer.ids(tokens_T).tolist() == [4, 201, 257, 8]
    layer.alike.set_value(layer.alike.get_value().at[200].set(3))
    assert layer.ids(tokens_T).tolist() == [4, 4, 257, 8]


# ----------------------------------------------------------------------------------------------------- in a whole model

MODEL = {"mixer": "window,gated_deltanet", "num_hidden_layers": 4, "num_fast_blocks": 2, "sliding_window": 6}
MODEL |= {"gated_deltanet": {"num_heads": 2, "head_dim": 2, "expand_v": 1.5, "chunk_size": 3}}
MODEL |= {"engram": FIELDS | {"blocks": "1,0"}}


@pytest.fixture(scope="module")
def reference():
    return gradients({"gradient": "reference", "clip_norm": 0.5}, **MODEL)


@pytest.mark.parametrize(
    "policy",
    [pytest.param(policy, marks=() if policy in COVER else pytest.mark.slow) for policy in POLICIES],
    ids="/".join,
)
def test_the_meta_gradient_is_that_of_autodiff(policy, reference):
    trajectory, remat = policy
    inner = {"clip_norm": 0.5, "trajectory": trajectory, "remat": remat, "segment_length": 2}
    assert_equal(gradients(inner, **MODEL), reference)
    assert all(np.any(a) for a in jax.tree.leaves(reference[0][1]["slow"]["prefix_0"]["engram"]))


@pytest.mark.usefixtures("float64")
def test_read_in_pieces_and_decoded_as_at_once_and_a_state_saved(tmp_path):
    assert_read_in_any_way(learning_model(**MODEL), T, tmp_path)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("lost", ("ids", "inputs"))
def test_a_lost_state_would_be_seen(lost, monkeypatch):
    """The wrong variant: an Engram that forgets, at every mini-batch, what came before."""
    extend_right = Engram.extend

    def extend(self, x_bD, compute, state, context):
        return extend_right(self, x_bD, compute, state._replace(**{lost: 0 * getattr(state, lost)}), context)

    model, tokens_BT1 = learning_model(**MODEL), some_tokens(1, T)
    expected = read_at_once(model, tokens_BT1)
    monkeypatch.setattr(Engram, "extend", extend)
    reader = reader_of(model)
    _, nll_BT = reader.read(reader.start(tokens_BT1[:, 0]), tokens_BT1[:, 1:])
    np.testing.assert_allclose(nll_BT[:, :b], expected.token_nll_T[:, :b], rtol=1e-9)
    assert np.max(np.abs(nll_BT - expected.token_nll_T)) > 1e-3


@pytest.mark.usefixtures("float64")
def test_no_token_is_seen_before_it_is_read():
    """By changes: a token changes its own NLL and later ones, and those of the next two at least; none before."""
    model, tokens = learning_model(**MODEL), distinct_tokens()
    nll = jax.jit(lambda tokens: read(model, model.params, tokens, 0.3).token_nll_T)
    expected = nll(tokens)
    for t in range(1, len(tokens) - 1):
        changed = tokens.copy()
        changed[t] = 28 if tokens[t] != 28 else 27
        depends = np.abs(nll(changed) - expected) > 1e-12
        assert not depends[: t - 1].any() and depends[t - 1 :].all()


@pytest.mark.usefixtures("float64")
def test_the_n_grams_of_a_token_matter_and_no_future_does():
    """By gradients with respect to what was looked up, of a model of which nothing else mixes positions."""
    layer = engram_of()
    random = np.random.default_rng(0)
    layer.conv.set_value(jnp.asarray(random.normal(size=(8, 4))))
    x_TD, e_TE = random.normal(size=(12, 8)), random.normal(size=(12, 12))

    def outputs(e_TE):
        return layer.read_out(x_TD, e_TE, Pass(), layer.empty(0).inputs)[0].sum(axis=1)

    depends = np.abs(jax.jacrev(outputs)(e_TE)).sum(axis=-1) > 0  # [output at, n-gram that ends at]
    back = np.arange(12)[:, None] - np.arange(12)
    assert np.array_equal(depends, np.isin(back, (0, 3, 6, 9)))


# ----------------------------------------------------------------------------------------------- the start, the control


def small(**fields):
    model = {
        "vocab_size": 29,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_fast_blocks": 1,
    }
    return from_config_dict({"model": model | {"num_hidden_layers": 3} | fields}).model


def without_engram(params: dict) -> dict:
    """The parameters of three blocks, the second of which had an Engram, as those of a model that has none."""
    slow = dict(params["slow"])
    plain = [slow.pop("prefix_0"), slow.pop("prefix_1")]
    plain[1] = {name: value for name, value in plain[1].items() if name != "engram"}
    slow["prefix"] = jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *plain)
    return {"fast": params["fast"], "slow": slow}


def initial(config):
    graphdef, fast, slow = split(Transformer(config, nnx.Rngs(0)))
    return graphdef, {"fast": fast, "slow": slow}


@pytest.mark.parametrize("zero_init", (True, False))
def test_a_start_that_changes_nothing_and_learns(zero_init):
    """Equal to the bit; otherwise, the wrong variant, it is not."""
    graphdef, params = initial(small(engram=FIELDS | {"zero_init": zero_init}))
    plain, _ = initial(small())
    tokens_T = jnp.asarray(np.random.default_rng(0).integers(0, 29, 20))

    def hidden(graphdef, params):
        model = merge(graphdef, params["fast"], params["slow"])
        return model.run_prefix(model.embed(tokens_T), tokens_T)

    assert np.array_equal(hidden(graphdef, params), hidden(plain, without_engram(params))) == zero_init
    gradient = jax.grad(lambda params: jnp.sum(hidden(graphdef, params) ** 2))(params)["slow"]["prefix_1"]["engram"]
    assert np.linalg.norm(gradient["wv"]) > 1e-3
    assert np.any(gradient["table"]) != zero_init


def test_the_control_has_one_row_a_table():
    layer = engram_of(one_row=True)
    assert layer.table.get_value().shape == (4, 3)
    rows_TN = layer.rows(jnp.arange(1, 30), jnp.zeros(2, jnp.int32))
    assert np.array_equal(rows_TN, np.tile(np.arange(4), (29, 1)))
    usual = engram_of()
    assert usual.flops(16) == layer.flops(16) and usual.wk.get_value().shape == layer.wk.get_value().shape


@pytest.mark.slow
def test_it_is_the_memory_that_learns_n_grams(tmp_path):
    """Four in five tokens are a random function of the two before them, which a model of width 16 does not learn soon.

    The entropy is 1.2 nats, that of a uniform distribution 3.4.
    """
    random = np.random.default_rng(0)
    following = random.integers(2, VOCABULARY, (VOCABULARY, VOCABULARY))
    tokens = random.integers(2, VOCABULARY, 40_000)
    for t in np.flatnonzero(random.random(len(tokens)) < 0.8):
        tokens[t] = following[tokens[t - 2], tokens[t - 1]] if t > 1 else tokens[t]
    writer = TokenWriter(tmp_path / "tokens", "train", VOCABULARY)
    writer.append(tokens)
    writer.close()
    write_group(tmp_path / "tokens")

    def loss(one_row: bool) -> float:
        engram = FIELDS | {"blocks": "0", "table_size": 2000, "head_dim": 8, "one_row": one_row}
        more = {"train": {"num_steps": 200}, "optimizer": {"learning_rate": 1e-2}}
        more |= {"eval": {"every_steps": 0}, "checkpoint": {"every_steps": 0}}
        config = tiny_run(tmp_path / "tokens", model={"engram": engram}, **more)
        return train(config, tmp_path / str(one_row))["loss"]

    assert loss(one_row=False) < 2.2 < 2.8 < loss(one_row=True)


# ------------------------------------------------------------------------------------------------- training, the mesh


@pytest.mark.parametrize("name", ("adamw", "muon"))
def test_tables_learn_five_times_as_fast_and_do_not_decay(name):
    config = small(engram=FIELDS)
    traits = parameter_traits(config)
    tables = [key for key, of_leaf in traits.items() if key.endswith("engram.table")]
    assert tables == ["slow.prefix_1.engram.table"]
    assert (traits[tables[0]].rate, traits[tables[0]].decays) == (5.0, False)
    _, params = initial(config)
    fields = {"warmup_steps": 0, "decay_steps": 100, "learning_rate": 0.1, "end_learning_rate": 0.1, "clip_norm": 0.0}
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.5, **fields), params, config)
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates["slow"]["prefix_1"]["engram"]["table"], -0.5, rtol=1e-5)  # by AdamW
    embedding, update = params["slow"]["embedding"], updates["slow"]["embedding"]
    np.testing.assert_allclose(update, -0.1 - 0.1 * 0.5 * embedding, rtol=1e-5)
    assert optax.tree.norm(updates["slow"]["prefix_1"]["engram"]["wk"]) > 0


def divided_program(mesh_shape, dtype="float64", **engram):
    """The program of tests/train/test_division.py, with weights such that each has a gradient of its own."""
    sections = to_dict(make_config("e2e", mesh_shape, "matrices", dtype))
    sections["model"]["engram"] = FIELDS | {"table_size": 50} | engram
    return gradient_program(from_config_dict(sections))


@cache
def divided(mesh_shape, head_dim: int):
    with jax.enable_x64(True):
        program, params, tokens = divided_program(mesh_shape, head_dim=head_dim)
        return jax.device_get(program(params, tokens))


@pytest.mark.parametrize("head_dim", (8, 3))
@pytest.mark.parametrize("mesh_shape", [(4, 2), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_divided_among_eight_devices(mesh_shape, head_dim):
    """Devices have rows and columns of the table, or only rows where they do not divide the columns."""
    (loss, gradient), (other_loss, other) = divided((1, 1), head_dim), divided(mesh_shape, head_dim)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-10)
    errors = jax.tree.map(lambda a, e: np.max(np.abs(a - e)) / np.max(np.abs(e)), other, gradient)
    assert max(jax.tree.leaves(errors)) < 1e-10, errors
    assert all(np.any(a) for a in jax.tree.leaves(gradient["slow"]["prefix_1"]["engram"]))


@pytest.mark.parametrize(("head_dim", "moves_the_table"), ((8, False), (3, True)))
def test_devices_exchange_rows_and_no_table(head_dim, moves_the_table):
    """Where `data` does not divide the columns, the table's gradient is summed, which the test sees."""
    program, params, tokens = divided_program((4, 2), "float32", head_dim=head_dim, table_size=20_000)
    table = params["slow"]["prefix_1"]["engram"]["table"]
    assert table.addressable_shards[0].data.size == table.size // (2 if moves_the_table else 8)
    text = program.lower(params, tokens).compile().as_text()
    received = max(c.received_bytes for c in collectives(text, {"data": 4, "model": 2}))
    assert (received > table.nbytes / 8) == moves_the_table


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_run_keeps_the_tokens_that_are_alike_by_its_tokenizer(optimizer, token_store, tmp_path, caplog):
    """Of the 31 tokens of the store, ten are white space if they are bytes. Training does not change them."""
    caplog.set_level("INFO")
    fields = {"model": {"engram": FIELDS | {"blocks": "0", "compress_tokens": True}, "param_dtype": "bfloat16"}}
    fields |= {"train": {"num_steps": 3}, "optimizer": {"name": optimizer}}
    expected = np.arange(31)
    expected[[9, 10, 11, 12, 13, 28, 29, 30]] = 9
    for name, tokenizer, alike in (("run", "bytes", expected), ("other", "", np.arange(31))):
        config = tiny_run(token_store, **fields, data={"tokenizer": tokenizer})
        assert np.isfinite(train(config, tmp_path / name)["loss"])
        params = load_params(tmp_path / name, abstract_model(config.model)[1])
        np.testing.assert_array_equal(params["slow"]["prefix"]["engram"]["alike"], [alike])
        assert ("to Engram, no two tokens are alike" in caplog.text) == (tokenizer == "")
        caplog.clear()


def test_positions_are_not_divided(token_store):
    fields = {"model": {"engram": FIELDS | {"blocks": "0"}}, "mesh": {"data": 4, "model": 2}}
    config = tiny_run(token_store, **fields)
    assert not take_policies(config, make_mesh(config.mesh)).division.by_sequence
    config = tiny_run(token_store, **fields | {"mesh": {"data": 4, "model": 2, "prefix": "sequence"}})
    message = r"config.model.engram.blocks is '0', and Engram does not divide.*: config.mesh.prefix must be 'matrices'"
    with pytest.raises(UserError, match=message):
        take_policies(config, make_mesh(config.mesh))


def test_a_tokenizer_that_cannot_be_read_leaves_no_run_directory(token_store, tmp_path):
    """One would refuse the change to the model that the message proposes."""
    engram = FIELDS | {"blocks": "0", "compress_tokens": True}
    config = tiny_run(token_store, model={"engram": engram}, data={"tokenizer": str(tmp_path / "none.model")})
    with pytest.raises(UserError, match=r"none.model.*with config.model.engram.compress_tokens=False\)$"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_large_table_takes_no_memory_but_its_own():
    """It is stored with the parameters: the estimate of temporaries, by which "auto" chooses, leaves it out."""

    def estimate(table_size):
        sizes = {"num_fast_blocks": 1, "engram": FIELDS | {"table_size": table_size}}
        config = from_config_dict({"model": sizes, "train": {"seq_len": 32}, "inner": {"mini_batch_size": 8}})
        inner = dataclasses.replace(config.inner, trajectory="store", remat="mini_batch")
        graphdef, params = abstract_model(config.model)
        return held_bytes(inner, graphdef, **params, tokens=jax.ShapeDtypeStruct((2, 33), jnp.int32))

    assert estimate(100_000) == estimate(100)


def test_its_products_are_counted(token_store):
    config, plain = (tiny_run(token_store, model={"engram": engram}) for engram in (FIELDS | {"blocks": "0"}, {}))
    more = model_flops_per_token(config) - model_flops_per_token(plain)
    assert more == 3 * (2 * 2 * 16 * 12 + 2 * 4 * 16)


# ----------------------------------------------------------------------------------------------------------- the config


def test_each_block_with_one_is_a_stack_of_its_own_and_others_keep_their_names():
    model = abstract_transformer(small(num_hidden_layers=8, engram=FIELDS | {"blocks": "4,2"}))
    stacks = {name: (stack.segment, stack.engram and stack.engram.block) for name, stack in model.stacks.items()}
    assert stacks == {
        "prefix_0": (0, None),
        "prefix_1": (1, 2),
        "prefix_2": (1, None),
        "prefix_3": (1, 4),
        "prefix_4": (2, None),
        "suffix": (0, None),
    }
    assert list(abstract_transformer(small(num_hidden_layers=8)).stacks) == ["prefix", "suffix"]


def test_a_config_without_one_does_not_mention_it():
    assert "engram" not in to_dict(from_config_dict({"model": {"engram": {"head_dim": 3}}}))["model"]
    config = from_config_dict({"model": {"engram": FIELDS}})
    assert from_config_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"blocks": "3"},
            "config.model.engram.blocks is '3', but it must be different indices of blocks without a fast",
        ),
        ({"blocks": "4"}, "MLP, 0 to 2, separated by commas"),
        ({"blocks": "1,1"}, "0 to 2"),
        ({"blocks": "-1"}, "0 to 2"),
        ({"blocks": "1, 2"}, "0 to 2"),
        ({"blocks": "one"}, "0 to 2"),
        ({"blocks": "0", "num_fast_blocks": 4}, "empty, as all blocks have a fast MLP"),
        ({"table_size": 0}, "config.model.engram.table_size is 0, but it must be at least 1"),
        ({"table_size": 2**30}, f"at most {(2**31 - 1) // 4}, as all 4 tables of a block together"),
        (
            {"vocab_size": 2**24 + 1, "compress_tokens": True},
            "config.model.vocab_size is 16777217, but it must be at",
        ),
        ({"num_heads": 0}, "config.model.engram.num_heads is 0, but it must be at least 1 and at most 1024"),
        ({"tables": 3}, "config.model.engram has no field 'tables': did you mean 'table_size'?"),
    ],
)
def test_what_is_not_legal_is_refused_in_a_line(fields, message):
    model = {"num_hidden_layers": 4, "num_fast_blocks": 1}
    model |= {name: value for name, value in fields.items() if name in ("num_fast_blocks", "vocab_size")}
    model |= {"engram": FIELDS | {name: value for name, value in fields.items() if name not in model}}
    with pytest.raises(UserError) as error:
        from_config_dict({"model": model})
    assert message in str(error.value) and "\n" not in str(error.value)
