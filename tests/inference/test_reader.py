"""Reading in pieces is reading at once, whatever the pieces, the model and the precision.

Tolerances: float64 adds in different orders on both sides, through 3 blocks and several updates.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inference.conftest import assert_same_state, learning_model, read_at_once, reader_of, some_tokens
from tests.inner.conftest import BOS, b
from tests.model import naive
from ttt_e2e.errors import UserError
from ttt_e2e.model import Transformer

B, T = 2, 7 * b
EXACT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(scope="module")
def learning(model, reader):
    """A reader of a model that learns, a text [B, T + 1], and what reading it at once gives: NLL and fast weights."""
    with jax.enable_x64(True):
        tokens_BT1 = some_tokens(B, T)
        return reader, tokens_BT1, read_at_once(model, tokens_BT1)


@pytest.fixture(scope="module")
def in_float32():
    """The same reader in float32, as far as that goes."""
    return reader_of(learning_model(compute_dtype="float32", param_dtype="float32"))


def read_in_pieces(reader, tokens_BT1, cuts):
    """The state after the text and its NLL [B, T], read in pieces that end at `cuts`."""
    state, nlls = reader.start(tokens_BT1[:, 0], len(tokens_BT1)), []
    for piece_Bn in np.split(tokens_BT1[:, 1:], sorted(cuts), axis=1):
        state, nll_Bn = reader.read(state, piece_Bn)
        assert nll_Bn.shape == piece_Bn.shape
        nlls.append(nll_Bn)
    return state, np.concatenate(nlls, axis=1)


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, T), max_size=12))
def test_pieces_of_any_size_equal_one_shot(learning, cuts):
    reader, tokens_BT1, expected = learning
    with jax.enable_x64(True):
        state, nll_BT = read_in_pieces(reader, tokens_BT1, cuts)
        np.testing.assert_allclose(nll_BT, expected.token_nll_T, **EXACT)
        assert_same_state(state.fast, expected.fast, **EXACT)
        assert_same_state(state, read_in_pieces(reader, tokens_BT1, [])[0])  # a mini-batch ends here: to the bit


@settings(max_examples=10)
@given(cuts=st.lists(st.integers(0, T - 2), max_size=12))
def test_pieces_give_the_same_state_within_a_mini_batch(learning, cuts):
    reader, tokens_BT1, _ = learning
    with jax.enable_x64(True):
        state, _ = read_in_pieces(reader, tokens_BT1[:, :-2], cuts)
        whole, _ = read_in_pieces(reader, tokens_BT1[:, :-2], [])
        assert_same_state(state, whole, **EXACT)
        assert_same_state(state.fast, whole.fast)
        assert_same_state(state.states, whole.states)


def test_a_progress_bar_counts_the_tokens_of_every_piece(learning, monkeypatch):
    monkeypatch.setattr("ttt_e2e.inference.reader.PIECE", 2 * b + 1)
    reader, tokens_BT1, expected = learning
    counts = []
    with jax.enable_x64(True):
        start = reader.start(tokens_BT1[:, 0], B)
        _, nll_BT = reader.read(start, tokens_BT1[:, 1:], bar=SimpleNamespace(update=counts.append))
    np.testing.assert_allclose(nll_BT, expected.token_nll_T, **EXACT)
    assert counts == [B * 2 * b] * 3 + [B * b]


def test_one_by_one_equals_one_shot(learning):
    reader, tokens_BT1, expected = learning
    with jax.enable_x64(True):
        state, nll_BT = read_in_pieces(reader, tokens_BT1, range(1, T))
        np.testing.assert_allclose(nll_BT, expected.token_nll_T, **EXACT)
        assert_same_state(state.fast, expected.fast, **EXACT)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "fields",
    [
        {"num_fast_blocks": 0, "sliding_window": 0},
        pytest.param(  # no prefix
            {"num_fast_blocks": 3, "sliding_window": 0, "inner": {"trajectory": "delta"}}, marks=pytest.mark.slow
        ),
        {"sliding_window": 3, "mixer": "window,attention", "num_hidden_layers": 4},  # k < b
        pytest.param({"num_fast_blocks": 0}, marks=pytest.mark.slow),
        pytest.param({"sliding_window": 2 * T}, marks=pytest.mark.slow),
        pytest.param({"tie_word_embeddings": True, "qk_norm": False, "post_norm": False}, marks=pytest.mark.slow),
        pytest.param({"rope_style": "half", "inner": {"clip_norm": 0.0}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_model_is_read_as_at_once(fields):
    num_tokens = 4 * b if "mixer" in fields else T  # each size of a cache that grows is a program more
    model, tokens_BT1 = learning_model(**fields), some_tokens(B, num_tokens)
    expected = read_at_once(model, tokens_BT1)
    reader = reader_of(model, max_length=num_tokens)
    cuts = [cut for cut in (1, 2, 3, b - 1, 2 * b, 2 * b + 1, 5 * b + 2) if cut < num_tokens]
    state, nll_BT = read_in_pieces(reader, tokens_BT1, cuts)
    np.testing.assert_allclose(nll_BT, expected.token_nll_T, **EXACT)
    assert_same_state(state.fast, expected.fast, **EXACT)


@pytest.mark.usefixtures("float64")
def test_learning_may_be_switched_off(model, learning):
    reader, tokens_BT1, _ = learning
    first, second = np.split(tokens_BT1[:, 1:], [3 * b], axis=1)
    state, _ = reader.read(reader.start(tokens_BT1[:, 0], B), first)
    after, nll_Bn = reader.read(state, second, learn=False)
    assert_same_state(after.fast, state.fast)

    static_state, static_nll_BT = reader.read(reader.start(tokens_BT1[:, 0], B), tokens_BT1[:, 1:], learn=False)
    assert_same_state(static_state.fast, reader.start(0, B).fast)
    plain_nll_T = naive.plain_nll(model.params, model.config.model, tokens_BT1[0], windows=[6] * 3)
    np.testing.assert_allclose(static_nll_BT[0], plain_nll_T, **EXACT)
    assert np.all(nll_Bn[:, b:] != static_nll_BT[:, 4 * b :])  # what was learned before is still there


def test_float32_is_within_1e_4_of_float64(in_float32, learning):
    _, tokens_BT1, expected = learning
    _, nll_BT = read_in_pieces(in_float32, tokens_BT1, [3, 4, 2 * b + 1, 5 * b])
    assert nll_BT.dtype == np.float32
    np.testing.assert_allclose(nll_BT, expected.token_nll_T, rtol=0, atol=1e-4)


def test_bfloat16_caches_and_float32_fast_weights(learning):
    _, tokens_BT1, expected = learning
    reader = reader_of(learning_model(compute_dtype="bfloat16", param_dtype="bfloat16"))
    state, nll_BT = reader.read(reader.start(tokens_BT1[:, 0], B), tokens_BT1[:, 1:])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.fast)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.states)} == {"bfloat16"}
    assert nll_BT.dtype == np.float32
    np.testing.assert_allclose(nll_BT.mean(), expected.token_nll_T.mean(), rtol=0.05)
    _, token_B, nll_B = jax.eval_shape(lambda: reader.step(state, lambda logits_BV: logits_BV.argmax(-1)))
    assert (token_B.shape, nll_B.dtype.name) == ((B,), "float32")


def test_compiles_once_however_long_the_context_and_whatever_the_pieces(monkeypatch, in_float32):
    tokens_BT1 = some_tokens(B, 40 * b)
    state, _ = read_in_pieces(in_float32, tokens_BT1[:, : 2 * b + 3], [1, b + 2, 2 * b])  # has run every program
    sizes = {leaf.shape for leaf in jax.tree.leaves(state)}
    traces = []
    monkeypatch.setattr(Transformer, "embed", lambda self, tokens: traces.append(tokens.shape))
    state, _ = read_in_pieces(in_float32, tokens_BT1, range(5, 40 * b, 11))
    assert not traces
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == sizes


def test_the_state_passed_in_may_be_used_again(learning):
    reader, tokens_BT1, _ = learning
    with jax.enable_x64(True):
        state, _ = reader.read(reader.start(tokens_BT1[:, 0], B), tokens_BT1[:, 1 : b + 2])
        question = tokens_BT1[:, b + 2 : 2 * b + 3]
        _, nll_Bn = reader.read(state, question)
        _, again_Bn = reader.read(state, question)
        np.testing.assert_array_equal(nll_Bn, again_Bn)


def test_masked_targets_teach_nothing(learning):
    reader, _, _ = learning
    with jax.enable_x64(True):
        start = reader.start(BOS, B)
        state, nll_Bn = reader.read(start, np.full((B, 2 * b), BOS))
        assert np.all(nll_Bn > 0)  # unmasked
        assert_same_state(state.fast, start.fast)


def test_no_tokens_change_nothing(learning):
    reader, tokens_BT1, _ = learning
    with jax.enable_x64(True):
        start = reader.start(tokens_BT1[:, 0], B)
        state, nll_Bn = reader.read(start, tokens_BT1[:, :0])
    assert state is start
    assert nll_Bn.shape == (B, 0)


def test_a_token_that_is_not_in_the_vocabulary_is_refused(learning):
    reader, _, _ = learning
    with jax.enable_x64(True), pytest.raises(UserError, match=r"from 2 to 29, but .* below config.model.vocab_size 29"):
        reader.read(reader.start(BOS), [[2, 29]])


@pytest.mark.usefixtures("float64")
def test_full_attention_refuses_to_exceed_its_maximum():
    model = learning_model(num_fast_blocks=0, sliding_window=0)
    with pytest.raises(UserError, match=r"max_length is 0.*full attention"):
        reader_of(model)
    reader = reader_of(model, max_length=6)
    state = reader.start(BOS)._replace(position=np.int64(6))
    for read_on in (lambda: reader.read(state, [[2]]), lambda: reader.step(state, lambda logits_BV: logits_BV[:, 0])):
        with pytest.raises(UserError, match=r"max_length is 6, but 6 tokens were read and 1 more"):
            read_on()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "fields", [{}, {"sliding_window": 3, "mixer": "window,attention", "num_hidden_layers": 4}], ids=str
)
def test_rated_tokens_have_the_nll_of_reading_them_and_are_not_read(fields, monkeypatch):
    monkeypatch.setattr("ttt_e2e.inference.reader.MIN_RATED", 1)  # b is small
    reader, tokens_BT1 = reader_of(learning_model(**fields), max_length=3 * b), some_tokens(B, 3 * b)
    state, _ = reader.read(reader.start(tokens_BT1[:, 0], B), tokens_BT1[:, 1 : 2 * b + 1])
    rest_Bb = tokens_BT1[:, 2 * b + 1 :]
    _, expected_Bb = reader.read(state, rest_Bb)
    likeliest = []
    decoding = state
    for i in range(b):

        def choose(logits_BV, i=i):
            likeliest.append(np.asarray(logits_BV.argmax(-1)))
            return rest_Bb[:, i]

        decoding, _, _ = reader.step(decoding, choose)
    for n in (1, b - 1, b):
        nll_Bn, is_likeliest_Bn = reader.rate(state, rest_Bb[:, :n])
        np.testing.assert_allclose(nll_Bn, expected_Bb[:, :n], **EXACT)
        np.testing.assert_array_equal(is_likeliest_Bn, np.stack(likeliest, axis=1)[:, :n] == rest_Bb[:, :n])
    rated = np.stack(likeliest[:1], axis=1)
    assert reader.rate(state, rated)[1].all()
    with pytest.raises(ValueError, match="no beginning of a mini-batch"):
        reader.rate(decoding._replace(position=decoding.position + 1), rest_Bb)
    with pytest.raises(UserError, match="tokens to read are from"):
        reader.rate(state, rest_Bb + 1000)
