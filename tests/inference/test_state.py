"""A state comes back as it was, for the model that it belongs to and no other."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.inference.conftest import assert_same_state, learning_model, reader_of, some_tokens
from tests.inner.conftest import BOS, b
from ttt_e2e.errors import UserError
from ttt_e2e.inference.state import load_state, parameters_digest, save_state

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def middle(reader):
    """A state in the middle of a mini-batch, of two sequences, and what follows."""
    tokens_BT1 = some_tokens(2, 6 * b)
    state, _ = reader.read(reader.start(tokens_BT1[:, 0], 2), tokens_BT1[:, 1 : 3 * b + 3])
    return state, tokens_BT1[:, 3 * b + 3 :]


def test_saved_and_restored_in_a_mini_batch_changes_nothing(reader, middle, tmp_path):
    state, rest = middle
    save_state(tmp_path / "state", reader, state)
    restored = load_state(tmp_path / "state", reader)
    assert_same_state(restored, state)
    after, nll_Bn = reader.read(state, rest)
    restored_after, restored_nll_Bn = reader.read(restored, rest)
    np.testing.assert_array_equal(restored_nll_Bn, nll_Bn)
    assert_same_state(restored_after, after)


def test_bfloat16_stores_the_difference(reader, middle, tmp_path):
    state, _ = middle
    save_state(tmp_path / "state", reader, state, precision="bfloat16")
    restored = load_state(tmp_path / "state", reader)
    assert_same_state(restored._replace(fast=None), state._replace(fast=None))
    start = reader.start(BOS, 2).fast

    def check(w, restored_w, w_0):
        assert np.any(w != w_0)
        np.testing.assert_allclose(restored_w - w_0, w - w_0, rtol=2**-8, atol=1e-12)
        assert restored_w.dtype == w.dtype

    jax.tree.map(check, state.fast, restored.fast, start)


def other(model, **changes):
    return reader_of(dataclasses.replace(model, **changes))


def test_another_model_refuses_it(model, reader, middle, tmp_path):
    save_state(tmp_path / "state", reader, middle[0])
    wider = reader_of(learning_model(fast_intermediate_size=12))
    with pytest.raises(UserError, match=r"state .*/state belongs to a model whose model.fast_intermediate_size is 10"):
        load_state(tmp_path / "state", wider)

    slow = model.params["slow"]
    nudged = {**model.params, "slow": {**slow, "head": slow["head"].at[3, 4].add(1e-15)}}
    with pytest.raises(UserError, match=r"belongs to parameters [0-9a-f]{16}; these are [0-9a-f]{16}: load it with"):
        load_state(tmp_path / "state", other(model, params=nudged))

    inner = dataclasses.replace(model.config.inner, mini_batch_size=2)
    with pytest.raises(UserError, match=r"mini_batch_size 4; here it is 2"):
        load_state(tmp_path / "state", other(model, config=dataclasses.replace(model.config, inner=inner)))


def test_the_digest_sees_values_names_and_types():
    params = {"a": np.arange(6.0, dtype=np.float32), "b": np.zeros(3, np.float32)}
    variants = [
        params,
        {**params, "a": params["a"][::-1]},
        {**params, "a": np.nextafter(params["a"], 9)},
        {**params, "a": params["a"].reshape(2, 3)},
        {"a": params["a"], "c": params["b"]},
        {**params, "b": jax.numpy.zeros(3, "bfloat16")},
    ]
    assert len({parameters_digest(variant) for variant in variants}) == len(variants)
    assert parameters_digest(params) == parameters_digest(jax.tree.map(jax.numpy.asarray, params))


def test_digests_in_old_states_and_records_stay_what_they_were(caplog):
    ramp = np.arange(24.0).reshape(2, 3, 4) / 7
    slow = {"embedding": jax.numpy.asarray(ramp[0], "bfloat16"), "norm": ramp}
    params = {"fast": {"w1": ramp.astype(np.float32)}, "slow": slow}
    assert parameters_digest(params) == "7791e190fd2c18f3"  # by the checksum of its own that state.py had at first
    with jax.log_compiles(), caplog.at_level("WARNING"):
        parameters_digest({**params, "fast": {"w1": params["fast"]["w1"] + 1}})
    assert "Compiling" not in caplog.text


def test_what_is_no_whole_state_is_refused(reader, middle, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(UserError, match=r"state holds no saved state: expected"):
        load_state(path, reader)
    save_state(path, reader, middle[0])
    with pytest.raises(UserError, match=r"state already exists: remove it"):
        save_state(path, reader, middle[0])
    with pytest.raises(UserError, match=r"precision is 'int8', but it must be one of float32, bfloat16"):
        save_state(tmp_path / "other", reader, middle[0], precision="int8")
    for file in Path(path / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match=r"state .* is damaged: [^\n]*$"):
        load_state(path, reader)
    shutil.rmtree(path / "about")
    with pytest.raises(UserError, match=r"holds no saved state"):
        load_state(path, reader)


def test_full_attention_may_go_on_with_more_room(tmp_path):
    model, tokens_BT1 = learning_model(num_fast_blocks=0, num_hidden_layers=1, sliding_window=0), some_tokens(1, 3 * b)
    short, long = reader_of(model, max_length=2 * b), reader_of(model, max_length=4 * b)
    text, rest = np.split(tokens_BT1[:, 1:], [b + 2], axis=1)
    state, _ = short.read(short.start(tokens_BT1[:, 0]), text)
    save_state(tmp_path / "state", short, state)
    _, nll_Bn = long.read(load_state(tmp_path / "state", long), rest)
    _, expected_Bn = long.read(long.start(tokens_BT1[:, 0]), tokens_BT1[:, 1:])
    np.testing.assert_allclose(nll_Bn, expected_Bn[:, b + 2 :], rtol=1e-10)
    with pytest.raises(UserError, match=r"state has 6 tokens; max_length is 5, but must not be less"):
        load_state(tmp_path / "state", reader_of(model, max_length=5))
