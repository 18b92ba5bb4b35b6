"""Readers of tiny models, and what they are held against: the whole text read at once by the inner loop."""

import jax
import numpy as np
import pytest

from tests.inner.conftest import BOS, LEARNING_RATE
from tests.inner.conftest import learning_model as inner_learning_model
from tests.model.tiny import TinyModel
from ttt_e2e.config import from_config_dict, to_dict
from ttt_e2e.inference.reader import Reader, ReaderState
from ttt_e2e.inference.state import load_state, save_state
from ttt_e2e.inner import Reading, read_batch

# Shapes: B sequences, T tokens read, V vocabulary.
V = 29


def learning_model(**fields) -> TinyModel:
    """That of tests/inner, with its learning rate and BOS in the configuration."""
    model = inner_learning_model(**fields)
    sections = to_dict(model.config)
    sections["inner"]["learning_rate"] = LEARNING_RATE
    sections["data"]["bos_id"] = BOS
    return TinyModel(from_config_dict(sections), model.graphdef, model.params)


def reader_of(model: TinyModel, **options) -> Reader:
    return Reader(model.graphdef, model.params, model.config, **options)


def some_tokens(num_sequences: int, T: int, seed: int = 0) -> np.ndarray:
    """Tokens [B, T + 1], of which about one in ten is BOS."""
    random = np.random.default_rng(seed)
    tokens_BT1 = random.integers(2, V, (num_sequences, T + 1))
    return np.where(random.random(tokens_BT1.shape) < 0.1, BOS, tokens_BT1)


def read_at_once(model: TinyModel, tokens_BT1) -> Reading:
    """What evaluation computes; T must be a multiple of the mini-batch."""
    fast = jax.tree.map(lambda w: np.broadcast_to(w, (len(tokens_BT1), *w.shape)), model.params["fast"])
    inner = model.config.inner
    options = {"inner": inner, "learning_rate": inner.learning_rate, "bos_id": model.config.data.bos_id}
    program = jax.jit(lambda fast, slow: read_batch(model.graphdef, fast, slow, np.asarray(tokens_BT1), **options))
    return jax.device_get(program(fast, model.params["slow"]))


def assert_read_in_any_way(model: TinyModel, T: int, tmp_path) -> None:
    """Reads T tokens in pieces, token by token, and from a state saved on the way: always as at once."""
    tokens_BT1, b = some_tokens(2, T), model.config.inner.mini_batch_size
    expected, reader = read_at_once(model, tokens_BT1), reader_of(model)
    for sizes in ([3, b + 1, 3 * b, 3 * b + 2], [1, 2, 3, b + 2]):
        state, nlls = reader.start(tokens_BT1[:, 0], 2), []
        for piece in np.split(tokens_BT1[:, 1:], sizes, axis=1):
            state, nll_Bn = reader.read(state, piece)
            nlls.append(nll_Bn)
        np.testing.assert_allclose(np.concatenate(nlls, axis=1), expected.token_nll_T, rtol=1e-9)

    state, decoded = reader.start(tokens_BT1[:, 0], 2), []
    for t in range(1, T - 1):
        state, _, nll_B = reader.step(state, lambda _, t=t: tokens_BT1[:, t])
        decoded.append(nll_B)
    np.testing.assert_allclose(np.stack(decoded, axis=1), expected.token_nll_T[:, : T - 2], rtol=1e-9)

    save_state(tmp_path / "state", reader, state)  # in the middle of a mini-batch
    restored = load_state(tmp_path / "state", reader)
    assert_same_state(restored, state)
    rest = tokens_BT1[:, T - 1 :]
    np.testing.assert_array_equal(reader.read(restored, rest)[1], reader.read(state, rest)[1])


def assert_same_state(state, expected, **tolerance):
    """Equal to the bit where there is no tolerance. What was prepared to predict tokens does not count."""
    if isinstance(state, ReaderState):
        state, expected = (s._replace(prepared=None) for s in (state, expected))
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda a, e: compare(np.asarray(a, float), np.asarray(e, float), **tolerance), state, expected)


@pytest.fixture(scope="session")
def model():
    with jax.enable_x64(True):
        return learning_model()


@pytest.fixture(scope="session")
def reader(model):
    """Of a model that learns, in float64: its programs serve all tests of this room."""
    with jax.enable_x64(True):
        return reader_of(model)
