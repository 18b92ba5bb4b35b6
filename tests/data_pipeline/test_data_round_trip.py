"""A text that its tokens cannot give back is said when it is prepared, with its share."""

import logging

import numpy as np
import pytest

from tests.lossy_model import train_lossy_model
from ttt_e2e.data.prepare import prepare
from ttt_e2e.data.readers import Document
from ttt_e2e.data.round_trip import describe_losses
from ttt_e2e.data.tokenizers import ByteTokenizer, load_tokenizer, train_sentencepiece


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "lossy.model"
    train_lossy_model(path)
    return path


def documents(*texts):
    return [Document(f"{i}.txt", text) for i, text in enumerate(texts)]


def test_the_share_of_documents_that_change(lossy):
    tokenizer = load_tokenizer(lossy)
    assert describe_losses(documents("abc de", "f"), tokenizer) == ""
    said = describe_losses(documents("abc de", "abc\nde", "ab  cd", "ef"), tokenizer)
    assert said == ("50.0% of the first 4 documents do not decode to themselves (1.txt, where 'c\\nde' becomes 'c de')")
    assert describe_losses(documents("Ab"), tokenizer).endswith("are the unknown one")


def test_the_share_of_unknown_tokens(lossy):
    tokenizer = load_tokenizer(lossy)
    num_tokens = len(tokenizer.encode("abc XY"))
    unknown = int(np.sum(tokenizer.encode("abc XY") == tokenizer.unknown_id))
    assert unknown > 0
    said = describe_losses(documents("abc XY"), tokenizer)
    assert said.endswith(f"; {unknown / num_tokens:.2%} of their tokens are the unknown one")


def test_tokenizers_that_lose_nothing_are_silent(tmp_path):
    """Bytes, and those that prepare trains, whatever the text; and no document is none."""
    texts = documents("a\n\n  b\tc\u00a0\u2581 é 𝄞\r\n", "", " x ", "\ufeffy\u0301")
    train_sentencepiece(["some words\n  and more"] * 20, 280, tmp_path / "own.model")
    for tokenizer in (ByteTokenizer(), load_tokenizer(tmp_path / "own.model")):
        assert describe_losses(texts, tokenizer) == describe_losses([], tokenizer) == ""


def test_the_first_documents_are_looked_at(lossy):
    """However many there are: here without end."""

    def endless():
        while True:
            yield Document("x", "a\nb" * 1000)

    said = describe_losses(endless(), load_tokenizer(lossy))
    assert said.startswith("100.0% of the first 1000 documents")


def test_prepare_says_it(lossy, tmp_path, caplog):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i, text in enumerate(("ab cd", "ab\ncd", "ef\ngh", "ij")):
        (corpus / f"{i}.txt").write_text(text)
    for tokenizer, said in ((str(lossy), 1), ("bytes", 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prepare(str(corpus), tokenizer, tmp_path / f"store{said}", num_workers=0, progress=False)
        assert len(caplog.records) == said
        if said:
            assert f"tokenizer {lossy}: 50.0% of the first 4 documents" in caplog.text
