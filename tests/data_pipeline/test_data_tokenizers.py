import hashlib

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ttt_e2e.data.documents import standard_library
from ttt_e2e.data.tokenizers import (
    ByteTokenizer,
    SentencePieceTokenizer,
    alike_tokens,
    load_tokenizer,
    train_sentencepiece,
)
from ttt_e2e.errors import UserError

quick = settings(max_examples=60, deadline=None, derandomize=True)
SOURCE = "def f(x):\n\treturn  [x   + 1,\r\n\n\n  'é 漢字 🎉 ▁ a▁b <s> <0x0A>\x00\u2028\u00a0 end']  "


def library_texts(count=15):
    return [document.text for document, _ in zip(standard_library(), range(count))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(library_texts(), 600, path)
    return path


@pytest.fixture(scope="module")
def piece_tokenizer(model):
    return load_tokenizer(model)


@quick
@given(st.text())
@example(SOURCE)
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.shape == (len(text.encode()),)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *ids.tolist(), tokenizer.bos_id]) == text


def test_bytes_decode_replaces_what_is_no_utf8():
    assert ByteTokenizer().decode([65, 0xFF, 256, 9999, 66]) == "A\ufffdB"


def test_sentencepiece_round_trip(piece_tokenizer):
    @quick
    @given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \t\n\r▁<>0123abc_():"))))
    @example(SOURCE)
    @example("▁")
    @example("")
    def check(text):
        ids = piece_tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert not np.isin(ids, [0, piece_tokenizer.bos_id]).any()  # never <unk>, and no BOS
        assert piece_tokenizer.decode(ids) == text
        with_others = [piece_tokenizer.bos_id, *ids.tolist(), piece_tokenizer.vocab_size + 5]
        assert piece_tokenizer.decode(with_others) == text

    check()


@pytest.mark.parametrize("name", ["pieces", "bytes"])
def test_bytes_of_ids_add_up_to_those_of_the_text(name, piece_tokenizer):
    tokenizer = {"pieces": piece_tokenizer, "bytes": ByteTokenizer()}[name]
    num_bytes = tokenizer.num_bytes()
    assert num_bytes.shape == (tokenizer.vocab_size,) and num_bytes[tokenizer.bos_id] == 0

    @quick
    @given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \t\n\r▁<>0123abc_():"))))
    @example(SOURCE)
    def check(text):
        assert num_bytes[tokenizer.encode(text)].sum() == len(text.encode())

    check()
    np.testing.assert_array_equal(tokenizer.num_bytes(first=True), num_bytes)


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory):
    """A tokenizer that puts a space before a text, as those of Llama 2 and Mistral: "a" is encoded as " a"."""
    path = tmp_path_factory.mktemp("llama") / "llama"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(library_texts(4)),
        model_prefix=str(path),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        max_sentence_length=10**6,
        minloglevel=2,
    )
    return load_tokenizer(f"{path}.model")


def test_a_space_that_the_tokenizer_puts_before_a_text_is_not_of_the_text(llama_tokenizer):
    """And a literal space mark, after which it must not put another, is not one."""
    first, others = llama_tokenizer.num_bytes(first=True), llama_tokenizer.num_bytes()

    @quick
    @given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \t\n\r▁<>0123abc_():"))))
    @example(" ")
    @example("  def")
    @example("\n")
    @example("漢")
    @example("▁")
    @example("▁a")
    @example(" ▁ a▁▁b ▁")
    @example(SOURCE)
    def check(text):
        ids, size = llama_tokenizer.encode(text), len(text.encode())
        assert llama_tokenizer.decode(ids) == text
        assert first[ids[:1]].sum() + others[ids[1:]].sum() == size
        if text and text[0] != "▁":
            assert others[ids].sum() == size + 1  # what counting would be that forgets the space

    check()


def test_sentencepiece_round_trip_and_compression_on_source_code(piece_tokenizer):
    for text in library_texts(40):
        ids = piece_tokenizer.encode(text)
        assert piece_tokenizer.decode(ids) == text
        assert len(ids) < 0.75 * len(text.encode()) or len(text) < 200


def test_bytes_are_alike_in_case_and_as_white_space():
    alike = alike_tokens(ByteTokenizer(), 260)
    expected = np.arange(260)
    expected[ord("a") : ord("z") + 1] = np.arange(ord("A"), ord("Z") + 1)
    expected[[9, 10, 11, 12, 13, 28, 29, 30, 31, 32]] = 9
    np.testing.assert_array_equal(alike, expected)  # parts of characters, BOS and ids without a token by themselves
    np.testing.assert_array_equal(alike_tokens(ByteTokenizer(), 100), expected[:100])


def test_pieces_are_alike_whose_texts_are(piece_tokenizer):
    alike = alike_tokens(piece_tokenizer, piece_tokenizer.vocab_size)
    assert alike.dtype == np.int32 and len(set(alike.tolist())) < len(alike)
    assert (alike <= np.arange(len(alike))).all() and np.array_equal(alike[alike], alike)
    assert alike[0] == 0 and alike[piece_tokenizer.bos_id] == piece_tokenizer.bos_id
    texts = [piece_tokenizer.decode([token]) for token in range(len(alike))]
    for token, first in enumerate(alike):
        assert first == token or texts[token].lower().strip() == texts[first].lower().strip()
    self_id, also = piece_tokenizer.encode("self self")[[0, -1]]
    assert alike[self_id] == alike[also]


def test_training_is_deterministic_and_silent(tmp_path, capfd):
    for name in "ab":
        train_sentencepiece(iter(library_texts(4)), 400, tmp_path / f"{name}.model")
        load_tokenizer(tmp_path / f"{name}.model")
    a, b = (hashlib.sha256((tmp_path / f"{name}.model").read_bytes()).digest() for name in "ab")
    assert a == b
    assert capfd.readouterr() == ("", "")


def test_training_samples_very_long_lines_and_stays_lazy(tmp_path):
    taken = []

    def texts():
        for i in range(3):
            taken.append(i)
            yield f"{i} one very long line " * 500

    train_sentencepiece(texts(), 280, tmp_path / "tokenizer.model")
    assert taken == [0, 1, 2]


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["some text\n" * 3], 5, "train:5: .*at least 259"),
        (["".join(map(chr, range(0x4E00, 0x4F00)))], 300, r"train:300: .*at least \d+"),
        (["some text\n" * 3], 100_000, r"train:100000: .*at most \d+"),
        (["some text\n" * 3], 10**12, "train:1000000000000: "),
        ([], 300, "no text"),
        (["", "\n"], 300, "no text"),
    ],
)
def test_training_refuses(texts, vocab_size, message, tmp_path, capfd):
    with pytest.raises(UserError, match=message):
        train_sentencepiece(texts, vocab_size, tmp_path / "tokenizer.model")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_an_error_in_the_texts_ends_training(tmp_path):
    def texts():
        yield "some text " * 100
        raise UserError("line 3 is bad")

    with pytest.raises(UserError, match="line 3 is bad"):
        train_sentencepiece(texts(), 265, tmp_path / "tokenizer.model")
    assert not list(tmp_path.iterdir())


def test_load_refuses(tmp_path, capfd):
    with pytest.raises(UserError, match="'gpt2': unknown; legal: 'bytes' or"):
        load_tokenizer("gpt2")
    with pytest.raises(UserError, match=r"absent.model: cannot be read"):
        load_tokenizer(tmp_path / "absent.model")
    for content in (b"", b"no model at all"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match=r"bad.model: not a SentencePiece model"):
            SentencePieceTokenizer(tmp_path / "bad.model")
    assert capfd.readouterr() == ("", "")


def test_load_refuses_a_model_without_bos(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text to learn from"] * 5),
        model_prefix=str(tmp_path / "no_bos"),
        vocab_size=20,
        model_type="bpe",
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"no_bos.model: the model has no BOS"):
        load_tokenizer(tmp_path / "no_bos.model")
