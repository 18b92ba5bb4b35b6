"""Encodes text as token ids and decodes them: by bytes, by a SentencePiece model, which can be trained here, or by the
`tokenizer.json` of a Hugging Face model.
"""

import hashlib
import io
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import sentencepiece
from etils import epath

from ttt_e2e.data.pieces import cut
from ttt_e2e.data.tokenizer_json import CONFIG_NAME, JsonTokenizer, is_tiktoken
from ttt_e2e.errors import UserError
from ttt_e2e.paths import check, in_bucket

LEGAL_SPECS = "'bytes' or the path of a SentencePiece model ending in '.model', or of a tokenizer.json"

# A vocabulary is trained on at most this many lines, sampled uniformly, each cut into pieces of this many characters.
# That takes some tens of MB for ordinary text, and 1 GB at most.
_MAX_TRAINING_LINES = 500_000
_MAX_LINE_CHARACTERS = 500
_MIN_VOCAB_SIZE = 259  # every byte, BOS, the unknown piece that SentencePiece insists on, and one character

# SentencePiece writes a space as this character, and so cannot tell this character in a text from a space.
_SPACE_MARK = "\u2581"

_BEFORE_SPACE = re.compile(f"(?<=[^ {_SPACE_MARK}])(?= )")
# Appended to a serialized model, it sets `normalizer_spec.add_dummy_prefix` to false: protocol buffers merge.
_NO_SPACE_BEFORE = bytes([3 << 3 | 2, 2, 3 << 3, 0])
# Changed by every normalisation that SentencePiece has, and by a space put before a text.
_PROBE = "a  \tB\u00a0\uff21\ufb01e\u0301 "


class Tokenizer(Protocol):
    """The interface of a tokenizer. Its ids are below `vocab_size`."""

    vocab_size: int
    bos_id: int
    eos_id: int  # after a text, in models that were trained elsewhere; -1 for none
    unknown_id: int  # in place of what no other token stands for; -1 for none
    fingerprint: str  # equal for equal tokenizers

    def encode(self, text: str) -> np.ndarray:
        """Encodes `text` as token ids, int32 [num_tokens], without BOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes `ids` to text; BOS and ids outside the vocabulary are skipped."""

    def num_bytes(self, *, first: bool = False) -> np.ndarray:
        """Counts the UTF-8 bytes of the text of each id, [vocab_size]; those of an encoded text add up to its own.

        Ids that stand for no text, such as BOS, have 0. Of the `first` id of a text, a space does not count that the
        tokenizer itself puts there.
        """


class ByteTokenizer:
    """Encodes text as UTF-8 bytes: ids 0 to 255, and 256 for BOS."""

    vocab_size = 257
    bos_id = 256
    eos_id = -1
    unknown_id = -1
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        """Encodes `text` as its UTF-8 bytes, int32 [num_bytes], without BOS."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes `ids` to text; malformed UTF-8 becomes U+FFFD, and ids that are no byte (BOS) are skipped."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def num_bytes(self, *, first: bool = False) -> np.ndarray:
        """Counts 1 for each byte, and 0 for BOS, wherever in a text."""
        return (np.arange(self.vocab_size) < 256).astype(np.int64)


class SentencePieceTokenizer:
    """Encodes text by a SentencePiece model, read from a file, local or in a bucket.

    Raises UserError if the file is missing, is no SentencePiece model, or has no BOS piece.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            model = epath.Path(path).read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor()
            # SentencePiece loads zero bytes without an error, into a processor that cannot be used.
            loaded = bool(model) and self._processor.LoadFromSerializedProto(model)
        except OSError as error:
            raise UserError(f"tokenizer {path}: cannot be read ({error.strerror or error})") from None
        except RuntimeError:
            loaded = False
        if not loaded:
            if is_tiktoken(model):
                raise UserError(
                    f"tokenizer {path}: Llama 3's table of tiktoken, which does not say how text is cut into words;"
                    " legal: the tokenizer.json of the same model on Hugging Face"
                )
            raise UserError(f"tokenizer {path}: not a SentencePiece model; legal: {LEGAL_SPECS}")
        self.fingerprint = hashlib.blake2b(model, digest_size=8).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self.unknown_id = self._processor.unk_id()
        if self.bos_id < 0:
            raise UserError(f"tokenizer {path}: the model has no BOS piece; train it with one (bos_id >= 0)")
        pieces = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._space_mark_ids = pieces if all(map(self._processor.is_byte, pieces)) else []
        self._before_space = _BEFORE_SPACE if self._has_no_piece_across_spaces() else None
        self._puts_space = self._processor.normalize("a").startswith(_SPACE_MARK)
        self._inside = self._processor  # encodes what does not begin a text
        if self._puts_space and self._space_mark_ids:
            self._inside = sentencepiece.SentencePieceProcessor()
            self._inside.LoadFromSerializedProto(model + _NO_SPACE_BEFORE)

    def encode(self, text: str) -> np.ndarray:
        """Encodes `text` as token ids, int32 [num_tokens], without BOS."""
        parts = [self._encode(part) for part in cut(text, self._before_space)]
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def _encode(self, text: str) -> np.ndarray:
        if not self._space_mark_ids or _SPACE_MARK not in text:
            return np.asarray(self._processor.encode(text), np.int32)
        # Encoded as its three bytes, a literal space mark is not decoded to a space.
        first, *others = text.split(_SPACE_MARK)
        ids = [self._processor.encode(first), *([*self._space_mark_ids, *part] for part in self._inside.encode(others))]
        return np.asarray(list(itertools.chain(*ids)), np.int32)

    def _has_no_piece_across_spaces(self) -> bool:
        """Whether the tokens of a text are those of its two parts, wherever it is cut before the first of some spaces.

        They are if no piece has a space after another character, and the text is encoded as it is.
        """
        if self._processor.normalize(_PROBE) != _PROBE.replace(" ", _SPACE_MARK):
            return False
        pieces = (self._processor.id_to_piece(i) for i in range(self.vocab_size))
        return not any(re.search(f"[^{_SPACE_MARK}]{_SPACE_MARK}", piece) for piece in pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes `ids` to text; BOS and other control pieces, and ids outside the vocabulary, are skipped."""
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def num_bytes(self, *, first: bool = False) -> np.ndarray:
        """Counts the UTF-8 bytes of the text of each piece, [vocab_size].

        first: of the first piece of a text, without the space that some models put there (`add_dummy_prefix`).
        """
        processor = self._processor

        def count(i: int) -> int:
            if processor.is_byte(i):
                return 1
            if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
                return 0
            piece = processor.id_to_piece(i)
            return len(piece.replace(_SPACE_MARK, " ").encode()) - (
                first and self._puts_space and piece[0] == _SPACE_MARK
            )

        return np.array([count(i) for i in range(self.vocab_size)], np.int64)


def alike_tokens(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Finds for each token the first whose text is alike, int32 [vocab_size]: itself where there is none before it.

    Texts are alike if they are the same in Unicode's NFKC form, in lower case, and without white space around them. A
    token without a text, or with a part of a character, is like no other.
    """
    alike, firsts = np.arange(vocab_size, dtype=np.int32), {}
    for token in range(min(vocab_size, tokenizer.vocab_size)):
        text = tokenizer.decode([token])
        if text and "\ufffd" not in text:
            normal = unicodedata.normalize("NFKC", text).lower().strip()
            alike[token] = firsts.setdefault(normal, token)
    return alike


def load_tokenizer(spec: str | os.PathLike) -> Tokenizer:
    """Loads the tokenizer "bytes", or that of a path that ends in ".model" or ".json".

    Raises UserError for any other `spec`, and for files that are no such tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if in_bucket(spec):
        check("tokenizer", os.fspath(spec))
    if os.path.exists(spec) and not os.path.isfile(spec):  # a pipe would be read for ever, and is read twice
        raise UserError(f"tokenizer {os.fspath(spec)!r}: is no file; legal: {LEGAL_SPECS}")
    if os.fspath(spec).endswith(".model"):
        return SentencePieceTokenizer(spec)
    if os.fspath(spec).endswith(".json"):
        return JsonTokenizer(spec)
    raise UserError(f"tokenizer {os.fspath(spec)!r}: unknown; legal: {LEGAL_SPECS}")


def files_of(spec: str | os.PathLike) -> list[epath.Path]:
    """The files of the tokenizer `spec` of `load_tokenizer`, the one that `spec` names first."""
    if spec == "bytes":
        return []
    path = epath.Path(spec)
    beside = path.parent / CONFIG_NAME
    return [path, beside] if path.suffix == ".json" and beside.exists() else [path]


def file_digest(spec: str | os.PathLike) -> str:
    """Digest of the file that the tokenizer `spec` names, or `spec` itself where it is "bytes" or "".

    Raises UserError where the file cannot be read.
    """
    if spec in ("", "bytes"):
        return os.fspath(spec)
    try:
        return hashlib.blake2b(epath.Path(spec).read_bytes(), digest_size=8).hexdigest()
    except OSError as error:
        raise UserError(f"tokenizer {spec}: cannot be read ({error.strerror or error})") from None


def train_sentencepiece(texts: Iterable[str], vocab_size: int, output_path: str | os.PathLike) -> None:
    """Trains a BPE vocabulary with byte fallback, by which every text can be encoded and decodes to itself.

    Reads every text once and holds a uniform sample of their lines in memory. The same texts give the same model.
    Raises UserError if `vocab_size` is too small or too large for the texts; then no file is written.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise UserError(f"tokenizer train:{vocab_size}: the vocabulary must have at least {_MIN_VOCAB_SIZE} entries")
    lines = _TrainingLines(texts)
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            # No normalisation, as white space matters in source code.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=1,
            eos_id=-1,
            pad_id=-1,
            input_sentence_size=_MAX_TRAINING_LINES,
            shuffle_input_sentence=True,
            max_sentence_length=4 * _MAX_LINE_CHARACTERS,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise _training_error(lines, vocab_size, error) from None
    if lines.error:
        raise lines.error
    epath.Path(output_path).write_bytes(model.getvalue())


class _TrainingLines:
    """Iterates over pieces of the lines of texts, for the C++ trainer.

    The trainer takes an exception for the end of the iteration, so it is stored in `error`, to be raised afterwards.
    """

    def __init__(self, texts: Iterable[str]):
        self.error: BaseException | None = None
        self.count = 0
        self._lines = self._cut(texts)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise StopIteration from None
        self.count += 1
        return line

    @staticmethod
    def _cut(texts: Iterable[str]) -> Iterator[str]:
        """Cuts texts into lines, and these into pieces of at most `_MAX_LINE_CHARACTERS`."""
        for text in texts:
            for line in text.splitlines():
                for start in range(0, len(line), _MAX_LINE_CHARACTERS):
                    yield line[start : start + _MAX_LINE_CHARACTERS]


def _training_error(lines: _TrainingLines, vocab_size: int, error: Exception) -> BaseException:
    """The exception to raise where SentencePiece raised `error`: that of reading the texts, or a `UserError`."""
    if lines.error:
        return lines.error
    if not lines.count:
        return UserError("tokenizer train: there is no text to train on; legal: at least one line that is not empty")
    if match := re.search(r"value <= (\d+)", str(error)):
        return UserError(f"tokenizer train:{vocab_size}: the text supports a vocabulary of at most {match[1]}")
    if match := re.search(r"\d+ vs (\d+)", str(error)):
        return UserError(f"tokenizer train:{vocab_size}: the text needs a vocabulary of at least {match[1]}")
    return UserError(f"tokenizer train:{vocab_size}: SentencePiece refuses it ({' '.join(str(error).split())})")
