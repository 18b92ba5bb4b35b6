"""The bytes of targets are those of the text that they stand for, wherever documents begin."""

import math

import numpy as np
import pytest
import sentencepiece

from tests.evaluation.conftest import write_store
from ttt_e2e.config import from_config_dict
from ttt_e2e.data.store import TokenStore
from ttt_e2e.data.tokenizers import load_tokenizer
from ttt_e2e.evaluation.text_bytes import TextBytes, bits_per_byte

TEXTS = ["abc abc  abd\n", " a", "é 漢字", "", "abc"]


@pytest.fixture(params=["bytes", "pieces", "pieces after a space"])
def spec(request, tmp_path):
    """A tokenizer: of bytes, or SentencePiece's, which may put a space before every text."""
    if request.param == "bytes":
        return "bytes"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix="space" in request.param,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return str(tmp_path / "tokenizer.model")


def config_of(spec, bos_id, **data):
    fields = {"bos_id": bos_id, "tokenizer": spec} | data
    return from_config_dict({"model": {"vocab_size": 512}, "data": fields, "eval": {"batch_size": 2}})


def test_bytes_of_documents_are_those_of_their_texts(spec):
    tokenizer = load_tokenizer(spec)
    documents = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]
    for bos_id in (tokenizer.bos_id, 0):  # masked or not, BOS stands for no byte
        text = TextBytes(config_of(spec, bos_id))
        counts = [text.count(np.array([document])) for document in documents]
        assert counts == [len(each.encode()) for each in TEXTS]
        assert text.count(np.concatenate(documents)[None]) == sum(counts)
    assert text.tokenizer == tokenizer.fingerprint


def test_the_first_token_of_a_sequence_is_no_target_and_the_last_targets_can_be_chosen(tmp_path):
    write_store(tmp_path / "store")
    store, bos = TokenStore.open(tmp_path / "store", "val"), 256
    text = TextBytes(config_of("", bos, path=str(tmp_path / "store")))
    targets = store.sequences(range(5), 32)[:, 1:]
    assert text.count_sequences(store, 5, 32) == (targets != bos).sum()
    assert text.count_sequences(store, 5, 32, last=7) == (targets[:, -7:] != bos).sum()


def test_a_tokenizer_that_is_not_known_is_none():
    assert TextBytes.of(config_of("", 1)) is None
    assert TextBytes.of(config_of("absent.model", 1)) is None


def test_a_uniform_guess_among_bytes_is_eight_bits():
    assert bits_per_byte(math.log(256) * 10, 10) == pytest.approx(8)
