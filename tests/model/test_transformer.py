"""The network as a whole. Shapes: `T` positions, `b` mini-batch, `D` model width, `L` suffix blocks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.model import naive
from tests.model.tiny import tiny_model
from ttt_e2e.config import ModelConfig
from ttt_e2e.inner import read_sequence
from ttt_e2e.model import FastParam, Transformer, abstract_transformer
from ttt_e2e.model.mixers import Context
from ttt_e2e.model.mixers.attention import KeyValues
from ttt_e2e.model.parameters import merge, split

T = 12


def random_tokens(model, seed=0):
    return np.random.default_rng(seed).integers(1, model.config.model.vocab_size, T + 1)


def forward(model, tokens_T1):
    """NLL [T] of a model without fast weights."""

    @jax.jit
    def run(params):
        transformer = merge(model.graphdef, params["fast"], params["slow"])
        return transformer.nll(transformer.run_prefix(transformer.embed(tokens_T1[:-1])), tokens_T1[1:])

    return run(model.params)


@pytest.mark.parametrize(
    "windows, fields",
    [
        ([T] * 3, {}),
        ([4] * 3, {"sliding_window": 4}),
        ([4] * 3, {"sliding_window": 4, "tie_word_embeddings": True}),
        ([4] * 3, {"sliding_window": 4, "qk_norm": False, "post_norm": False, "num_key_value_heads": 4}),
        ([4, T] * 2, {"sliding_window": 4, "num_hidden_layers": 4, "mixer": "window,attention"}),
        ([T, 3, 3] * 2, {"sliding_window": 3, "num_hidden_layers": 6, "mixer": "attention,window,window"}),
        (
            [4, 4, T, 4, 4],
            {"sliding_window": 4, "num_hidden_layers": 5, "mixer": "window,window,attention,window,window"},
        ),
        ([T] * 3, {"sliding_window": 4, "mixer": "attention"}),
    ],
)
def test_stacked_blocks_equal_a_loop_over_blocks(float64, windows, fields):
    model = tiny_model(**fields)
    tokens_T1 = random_tokens(model)
    expected = naive.plain_nll(model.params, model.config.model, tokens_T1, windows)
    np.testing.assert_allclose(forward(model, tokens_T1), expected, rtol=1e-10)  # float64, through six blocks


def test_half_style_is_interleaved_with_the_channels_of_queries_and_keys_reordered(float64):
    model = tiny_model()
    half = tiny_model(rope_style="half")
    config, tokens_T1 = model.config.model, random_tokens(model)
    to_half = np.r_[0 : config.head_dim : 2, 1 : config.head_dim : 2]
    attention = half.params["slow"]["prefix"]["attention"]
    for name in ("wq", "wk"):
        heads = attention[name].reshape(config.num_hidden_layers, config.hidden_size, -1, config.head_dim)
        attention[name] = heads[..., to_half].reshape(attention[name].shape)
    for name in ("q_norm", "k_norm"):
        attention[name]["weight"] = attention[name]["weight"][..., to_half]
    np.testing.assert_allclose(forward(half, tokens_T1), forward(model, tokens_T1), rtol=1e-10)


def test_suffix_over_window_caches_equals_a_loop_over_blocks_of_the_whole_sequence(float64):
    """Wherever it is cut into mini-batches: over empty caches, partly filled ones and full ones."""
    model = tiny_model(num_hidden_layers=2, num_fast_blocks=2, sliding_window=5)
    x_TD = jnp.asarray(np.random.default_rng(0).normal(size=(T, 8)))
    expected_TD = x_TD
    for p in naive.suffix_blocks(model.params["fast"], model.params["slow"], model.config.model):
        expected_TD = naive.block(p, expected_TD, model.config.model, window=5)

    suffix = model.merge().make_suffix()
    states = suffix.empty(T)
    assert states["suffix"].k.shape == (2, 2, 5, 4)  # blocks, key/value heads, window, head width
    outputs = []
    for start, stop in ((0, 3), (3, 7), (7, T)):
        x_bD, entries, _ = suffix.extend(x_TD[start:stop], states, Context(start=start))
        states = suffix.advance(states, entries)
        outputs.append(x_bD)
    expected_TD = suffix.final_norm(expected_TD)
    np.testing.assert_allclose(jnp.concatenate(outputs), expected_TD, rtol=1e-10, atol=1e-12)


def test_cache_keeps_the_most_recent_positions():
    attention = abstract_transformer(ModelConfig()).prefix.mixer

    def positions(*values):
        array = jnp.asarray(values, jnp.float32)[None, :, None]
        return KeyValues(array, -array)

    def held(cache):
        np.testing.assert_array_equal(cache.k, -cache.v)
        return cache.k.ravel().tolist()

    cache = positions(1, 2, 3)
    assert held(attention.advance(cache, positions(4))) == [2, 3, 4]
    assert held(attention.advance(cache, positions(4, 5, 6))) == [4, 5, 6]
    assert held(attention.advance(cache, positions(4, 5, 6, 7, 8))) == [6, 7, 8]
    assert held(attention.resize(cache, 2)) == [2, 3]
    assert held(attention.resize(cache, 5)) == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("window, num_blocks, reach", [(3, 2, 4), (1, 2, 0), (0, 2, T)])
def test_prefix_sees_its_windows_and_never_ahead(float64, window, num_blocks, reach):
    """By gradients: position t depends on exactly those that `num_blocks` windows reach back to."""
    model = tiny_model(num_hidden_layers=num_blocks, sliding_window=window).merge()
    x_TD = jnp.asarray(np.random.default_rng(0).normal(size=(T, 8)))
    gradient_TTD = jax.jacrev(lambda x_TD: model.run_prefix(x_TD)[:, 0])(x_TD)
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    np.testing.assert_array_equal((gradient_TTD != 0).any(axis=-1), (distance >= 0) & (distance <= reach))


def test_split_separates_the_fast_matrices_from_everything_else_and_merge_inverts_it():
    model = tiny_model(num_fast_blocks=2, param_dtype="float32", compute_dtype="float32").merge()
    graphdef, fast, slow = split(model)
    assert jax.tree.map(jnp.shape, fast) == {
        "suffix": {"fast_mlp": {"w1": (2, 8, 10), "w2": (2, 10, 8), "w3": (2, 8, 10)}}
    }
    assert set(slow["suffix"]) == {
        *("attention", "attention_norm", "attention_post_norm", "mlp", "mlp_norm", "mlp_post_norm"),
        *("fast_mlp_norm", "fast_mlp_post_norm"),
    }
    tokens_T = jnp.arange(1, 5)
    again = merge(graphdef, fast, slow)
    np.testing.assert_array_equal(again.embed(tokens_T), model.embed(tokens_T))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again, FastParam), nnx.state(model, FastParam))


def test_initialisation_is_normal_with_the_configured_deviation_and_ones_for_norms():
    config = ModelConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_key_value_heads=4, head_dim=16,
        num_fast_blocks=1, fast_intermediate_size=64, initializer_range=0.05,
    )  # fmt: skip
    _, fast, slow = split(Transformer(config, nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path((fast, slow))
    matrices = [np.asarray(leaf).ravel() for path, leaf in leaves if path[-1].key != "weight"]
    for values in matrices:  # of 4096 numbers and more: the sample's deviation is within 5 % (4.5 sigma)
        assert abs(values.mean()) < 0.05 * 0.1
        np.testing.assert_allclose(values.std(), 0.05, rtol=0.05)
    for path, leaf in leaves:
        if path[-1].key == "weight":
            np.testing.assert_array_equal(leaf, 1)
    heads = [values[:100].tobytes() for values in matrices]
    assert len(set(heads)) == len(heads)  # no two drawn from the same key


def test_blocks_of_a_stack_are_initialised_independently():
    config = ModelConfig(vocab_size=8, hidden_size=8, num_key_value_heads=4, head_dim=2, intermediate_size=8)
    _, _, slow = split(Transformer(config, nnx.Rngs(0)))
    w1_LDF = np.asarray(slow["prefix"]["mlp"]["w1"])
    assert len(np.unique(w1_LDF)) == w1_LDF.size


def bfloat16_forward():
    """A model that computes in bfloat16; a function of its weights, and what that gives at every stage."""
    model = tiny_model(num_fast_blocks=2, sliding_window=4, compute_dtype="bfloat16", param_dtype="float32")

    def forward(params):
        transformer = merge(model.graphdef, params["fast"], params["slow"])
        suffix = transformer.make_suffix()
        tokens_T, states = jnp.arange(T), suffix.empty(4)
        x_TD = transformer.run_prefix(transformer.embed(tokens_T))
        y_TD, entries, _ = suffix.extend(x_TD, states, Context())
        return {"narrow": (x_TD, y_TD, states, entries), "wide": suffix.nll(y_TD, tokens_T)}

    return forward, model.params


def test_bfloat16_compute_keeps_hidden_states_and_caches_in_bfloat16_and_losses_in_float32():
    results = jax.eval_shape(*bfloat16_forward())
    assert {a.dtype for a in jax.tree.leaves(results["narrow"])} == {jnp.dtype("bfloat16")}
    assert results["wide"].dtype == jnp.float32


def test_bfloat16_compute_multiplies_bfloat16_matrices():
    forward, params = bfloat16_forward()
    program = jax.jit(forward).lower(params).as_text()
    operands = re.findall(r"dot_general.* : \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", program)
    # Of a block q, k, v, o, scores, values and an MLP, one more MLP in a suffix block, and the head.
    assert len(operands) == (6 + 3) + (6 + 3 + 3) + 1
    assert {dtype for pair in operands for dtype in pair} == {"bf16"}


def read(model, params, tokens_T1):
    return read_sequence(
        model.graphdef,
        params["fast"],
        params["slow"],
        tokens_T1,
        inner=model.config.inner,
        learning_rate=1.0,
        bos_id=0,
    )


def program_size(num_blocks: int, seq_len: int) -> int:
    """Lines of the program of the loss and its meta-gradient."""
    model = tiny_model(
        num_hidden_layers=num_blocks,
        num_fast_blocks=num_blocks // 4,
        sliding_window=4,
        compute_dtype="float32",
        param_dtype="float32",
        inner={"mini_batch_size": 4},
        train={"seq_len": seq_len},
    )
    tokens = jnp.zeros(seq_len + 1, int)
    lowered = jax.jit(jax.value_and_grad(lambda params: read(model, params, tokens).loss)).lower(model.params)
    return len(lowered.as_text().splitlines())


def test_program_grows_neither_with_depth_nor_with_the_sequence():
    """Blocks and mini-batches are scanned, not unrolled, so compile time does not grow either.

    Unrolled, the program would be four times as long. The tenth is for attention, which cuts the beginning of a
    sequence, where fewer keys are seen, into up to a fixed number of parts. (A suffix of one or two blocks is
    unrolled: hence the last line.)
    """
    size = program_size(num_blocks=16, seq_len=16)
    assert abs(program_size(num_blocks=64, seq_len=64) - size) < 0.1 * size
    assert abs(program_size(num_blocks=64, seq_len=16) - size) < 0.03 * size
    assert program_size(num_blocks=8, seq_len=16) < 1.25 * size
