import json
import shutil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ttt_e2e.data import pieces
from ttt_e2e.data.documents import standard_library
from ttt_e2e.data.prepare import prepare
from ttt_e2e.data.store import TokenStore
from ttt_e2e.data.tokenizer_json import _WORDS
from ttt_e2e.data.tokenizers import load_tokenizer, train_sentencepiece
from ttt_e2e.errors import UserError

tokenizers = pytest.importorskip("tokenizers", reason="the extra `huggingface` is not installed")

quick = settings(max_examples=60, deadline=None, derandomize=True)
any_text = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \t\n\r<>|0123abc_'st:")))
SOURCE = "def f(x):\n\treturn  [x   + 1,\r\n\n\n  'é 漢字 🎉 <|begin_of_text|> it's 1234 \x00\u2028\u00a0 end']  "
LLAMA_3 = next(regex for regex in _WORDS if regex.startswith("(?i:") and "{1,3}" in regex)


def library_texts(count=15):
    return [document.text for document, _ in zip(standard_library(), range(count))]


def byte_level(regex=LLAMA_3, *, template=True, bos="<|begin_of_text|>", eos="<|end_of_text|>"):
    """A tokenizer of the kind of Llama 3's: words by a regular expression, BPE of bytes, special tokens at the end."""
    from tokenizers import decoders, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    if regex:
        split = pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, rest])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(library_texts(), trainer)
    tokenizer.add_tokens(["\t\t\t"])
    tokenizer.add_special_tokens([bos, eos])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    byte_level().save(str(path))
    return path


def byte_fallback(path):
    """A tokenizer of the kind of Llama 2's and Mistral's: marked spaces, and pieces for bytes."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcé"]
    from tokenizers import decoders, normalizers

    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: i for i, piece in enumerate([*vocabulary, "\u2581a", "bc"])},
            merges=[("\u2581", "a"), ("b", "c")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback"])
def tokenizer(request, llama, tmp_path_factory):
    other = tmp_path_factory.mktemp("mistral") / "tokenizer.json"
    return load_tokenizer(llama if request.param == "byte_level" else byte_fallback(other))


def test_round_trip_and_bytes_of_ids(tokenizer):
    num_bytes = tokenizer.num_bytes()
    assert num_bytes.shape == (tokenizer.vocab_size,)
    assert num_bytes[tokenizer.bos_id] == num_bytes[tokenizer.eos_id] == 0

    @quick
    @given(any_text)
    @example(SOURCE)
    @example("\t\t\t\t")
    @example("")
    def check(text):
        if "\u2581" in text:
            return  # which such a tokenizer cannot tell from a space
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert not np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id]).any()
        assert num_bytes[ids].sum() == len(text.encode())
        with_others = [tokenizer.bos_id, *ids.tolist(), tokenizer.vocab_size + 5]
        assert tokenizer.decode(ids) == tokenizer.decode(with_others) == text

    check()


def test_a_space_that_the_tokenizer_puts_before_a_text_is_not_of_the_text(tmp_path):
    spec = json.loads(byte_fallback(tmp_path / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spec["normalizer"]]}
    spec["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    first, others = tokenizer.num_bytes(first=True), tokenizer.num_bytes()
    for text in ("a", " a", "bcé", "\n", "  ", "漢 a"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert first[ids[:1]].sum() + others[ids[1:]].sum() == len(text.encode()) == others[ids].sum() - 1


def test_only_a_space_that_is_put_there_is_left_out(tokenizer):
    np.testing.assert_array_equal(tokenizer.num_bytes(first=True), tokenizer.num_bytes())


def test_tokens_are_those_of_the_library(llama):
    ours, theirs = load_tokenizer(llama), tokenizers.Tokenizer.from_file(str(llama))
    for text in library_texts(30):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert ours.vocab_size == theirs.get_vocab_size() == 503
    # The text of a special token is text, and no token that ends a document.
    bos = "<|begin_of_text|>"
    assert theirs.encode(bos, add_special_tokens=False).ids == [ours.bos_id]
    assert len(ours.encode(bos)) > 3 and ours.decode(ours.encode(bos)) == bos


def test_bos_and_eos(tmp_path):
    path, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"

    def ids(**names):
        config.write_text(json.dumps(names))
        tokenizer = load_tokenizer(path)
        return tokenizer.bos_id, tokenizer.eos_id

    byte_level().save(str(path))
    bos, eos = 501, 502
    assert load_tokenizer(path).bos_id == bos and load_tokenizer(path).eos_id == eos
    assert ids(bos_token="<|end_of_text|>") == (eos, eos)  # the config's comes first
    assert ids(bos_token=None, eos_token={"content": "<|begin_of_text|>"}) == (bos, bos)
    config.unlink()
    byte_level(template=False, bos="<one>", eos="<two>").save(str(path))
    with pytest.raises(UserError, match=r"names no BOS; legal: a tokenizer_config.json beside it that has bos_token"):
        load_tokenizer(path)
    assert ids(bos_token="<one>") == (501, -1)
    with pytest.raises(UserError, match="has bos_token '<three>', which is no token of it"):
        ids(bos_token="<three>")
    config.write_text("{")
    with pytest.raises(UserError, match="beside it is no JSON"):
        load_tokenizer(path)


def test_fingerprint(llama, tmp_path):
    shutil.copy(llama, tmp_path)
    same = load_tokenizer(tmp_path / "tokenizer.json").fingerprint
    assert same == load_tokenizer(llama).fingerprint
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|end_of_text|>"}')
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint != same


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"no json", b"\xff", b'{"model": {"type": "none"}}'])
def test_refuses_what_is_none(content, tmp_path, capfd):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"tokenizer.json: cannot be read"):
        load_tokenizer(path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer.json of Hugging Face") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_missing_library(llama, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"reading it takes tokenizers: pip install 'ttt-e2e\[huggingface\]'"):
        load_tokenizer(llama)


def test_table_of_tiktoken_is_recognised(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIyM= 2\n")
    with pytest.raises(UserError, match=r"tokenizer.model: Llama 3's .*; legal: the tokenizer.json of the same model"):
        load_tokenizer(tmp_path / "tokenizer.model")


class Encodings:
    """Counts the pieces in which a text is encoded."""

    def __init__(self, monkeypatch):
        self.sizes, cut = [], pieces.cut

        def counted(text, boundary):
            for piece in cut(text, boundary):
                self.sizes.append(len(piece))
                yield piece

        for module in ("tokenizers", "tokenizer_json"):
            monkeypatch.setattr(f"ttt_e2e.data.{module}.cut", counted)


@pytest.mark.parametrize("words", [*range(len(_WORDS)), None, "sentencepiece"])
def test_pieces_of_a_long_text_give_its_tokens(words, tmp_path, monkeypatch):
    """However small the pieces, wherever they end; and they are that small."""
    if words == "sentencepiece":
        train_sentencepiece(library_texts(), 400, tmp_path / "tokenizer.model")
        tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    else:
        byte_level(words if words is None else sorted(_WORDS)[words]).save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    encodings = Encodings(monkeypatch)

    @quick
    @given(any_text)
    @example(SOURCE)
    @example("it's 12 34  5\n\nx \n y's  漢字\n漢 字 a_b c")
    def check(text):
        monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1 << 20)
        whole = tokenizer.encode(text)
        for size in (1, 2, 5):
            monkeypatch.setattr(pieces, "PIECE_CHARACTERS", size)
            np.testing.assert_array_equal(tokenizer.encode(text), whole)

    check()
    text = "\n".join(library_texts(10))
    whole = tokenizer.encode(text)
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 100)
    encodings.sizes.clear()
    np.testing.assert_array_equal(tokenizer.encode(text), whole)
    assert sum(encodings.sizes) == len(text) and np.mean(encodings.sizes) < 200 and max(encodings.sizes) < 3000


def test_a_wrong_place_to_cut_gives_other_tokens(llama, monkeypatch):
    """What the test above would find: a cut after white space, where a word may begin with it."""
    tokenizer = load_tokenizer(llama)
    whole = tokenizer.encode(SOURCE * 20)
    tokenizer._end_of_word = pieces.re.compile("(?<= )")
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 5)
    assert tokenizer.encode(SOURCE * 20).tolist() != whole.tolist()


def test_other_tokenizers_encode_a_text_at_once(tmp_path, llama):
    """They may have words with white space in them."""
    assert load_tokenizer(byte_fallback(tmp_path / "tokenizer.json"))._end_of_word is None
    spec = json.loads(llama.read_text())
    changes = {
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "added_tokens": [
            token | {"content": token["content"].replace("\t\t\t", "a b")} for token in spec["added_tokens"]
        ],
    }
    for name, value in changes.items():
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {name: value}))
        assert load_tokenizer(tmp_path / "tokenizer.json")._end_of_word is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"normalizer": {"type": "NFC"}}))
    assert load_tokenizer(tmp_path / "tokenizer.json")._end_of_word


def test_a_store_has_its_tokenizer(llama, tmp_path):
    shutil.copy(llama, tmp_path / "mine.json")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|end_of_text|>"}')
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(library_texts(4)):
        (tmp_path / f"corpus/{number}.txt").write_text(text)
    summary = prepare(str(tmp_path / "corpus"), str(tmp_path / "mine.json"), tmp_path / "store", progress=False)
    assert (summary["tokenizer"], summary["vocab_size"], summary["bos_id"]) == ("tokenizer.json", 503, 502)
    store = TokenStore.open(tmp_path / "store", "val")
    recorded = load_tokenizer(store.tokenizer_spec)
    assert recorded.bos_id == 502
    tokens = store.stretch(0, store.num_tokens)
    assert tokens[0] == 502 and recorded.decode(tokens) in library_texts(4)
