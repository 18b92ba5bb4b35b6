"""Bits per byte: the sum of the NLL over the bytes that the unmasked targets stand for."""

import math

import numpy as np

from ttt_e2e.config import from_config_dict
from ttt_e2e.evaluation.token_losses import _bits_per_byte, _write

BOS, T, NUM_SEQUENCES = 256, 8, 5


class Store:
    """Sequences of bytes with a BOS here and there."""

    def __init__(self):
        tokens = np.random.default_rng(0).integers(0, 256, (NUM_SEQUENCES, T + 1))
        self.tokens = np.where(np.random.default_rng(1).random(tokens.shape) < 0.2, BOS, tokens)

    def sequences(self, rows, seq_len, vocab_size):
        assert seq_len == T
        return self.tokens[list(rows)]


def figures(**sections) -> dict:
    fields = {"model": {"vocab_size": 300}, "eval": {"batch_size": 2}, "data": {"bos_id": BOS, "tokenizer": "bytes"}}
    config = from_config_dict(fields | sections)
    count = int((Store().tokens[:, 1:] != BOS).sum())
    metrics = {"num_sequences": NUM_SEQUENCES, "seq_len": T, "num_tokens": count, "token_loss": 2.0}
    return _bits_per_byte(config, "", Store(), metrics | {"token_loss_without_learning": 3.0})


def test_a_byte_is_a_token_for_the_tokenizer_of_bytes():
    count = int((Store().tokens[:, 1:] != BOS).sum())
    assert 0 < count < NUM_SEQUENCES * T
    expected = {"bits_per_byte": 2 / math.log(2), "bits_per_byte_without_learning": 3 / math.log(2)}
    assert figures() == {"tokenizer": "bytes", "num_bytes": count} | expected


def test_bos_that_is_not_masked_stands_for_no_byte():
    assert figures(data={"bos_id": 0, "tokenizer": "bytes"})["num_bytes"] == figures()["num_bytes"]


def test_without_a_tokenizer_there_are_none():
    assert figures(data={"bos_id": BOS}) == {}
    assert figures(model={"vocab_size": 200}, data={"bos_id": 1, "tokenizer": "bytes"}) == {}


def test_arrays_of_another_model_do_not_stay(tmp_path):
    nll = np.zeros((1, T))
    _write(tmp_path, {}, {"token_nll": nll, "token_nll_without_learning": nll})
    _write(tmp_path, {}, {"token_nll": nll})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "token_nll.npy"]
