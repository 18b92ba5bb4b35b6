"""Text to token ids and back: raw bytes, or a SentencePiece model."""

import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import sentencepiece
from etils import epath

from ttt_e2e.errors import UserError

LEGAL_SPECS = "'bytes' or the path of a SentencePiece model ending in '.model'"

# Training a vocabulary sees at most this many lines, sampled uniformly, each cut into pieces of this many characters:
# about 1 GB at the very worst, some tens of MB for ordinary text.
_MAX_TRAINING_LINES = 500_000
_MAX_LINE_CHARACTERS = 500
_MIN_VOCAB_SIZE = 259  # every byte, BOS, the unknown piece that SentencePiece insists on, and one character

# SentencePiece spells a space like this, and so cannot tell a literal one from a space.
_SPACE_MARK = "\u2581"


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer. Ids are below `vocab_size`."""

    vocab_size: int
    bos_id: int
    fingerprint: str  # the same for tokenizers that are the same

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [num_tokens], without BOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; BOS and ids that the tokenizer does not know leave no trace."""


class ByteTokenizer:
    """UTF-8 bytes, and one more id for BOS."""

    vocab_size = 257
    bos_id = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes of `text`, int32 [num_bytes], without BOS."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; malformed UTF-8 becomes U+FFFD, ids that are no byte (BOS) are skipped."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model from a file, local or in a bucket.

    Raises UserError if the file is missing, is no SentencePiece model, or has no BOS piece.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            model = epath.Path(path).read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor()
            # Loading zero bytes succeeds, and leaves a processor that cannot be used.
            loaded = bool(model) and self._processor.LoadFromSerializedProto(model)
        except OSError as error:
            raise UserError(f"tokenizer {path}: cannot be read ({error.strerror or error})") from None
        except RuntimeError:
            loaded = False
        if not loaded:
            raise UserError(f"tokenizer {path}: not a SentencePiece model; legal: {LEGAL_SPECS}")
        self.fingerprint = hashlib.blake2b(model, digest_size=8).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        if self.bos_id < 0:
            raise UserError(f"tokenizer {path}: the model has no BOS piece; train it with one (bos_id >= 0)")
        pieces = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._space_mark_ids = pieces if all(map(self._processor.is_byte, pieces)) else []

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [num_tokens], without BOS."""
        if not self._space_mark_ids or _SPACE_MARK not in text:
            return np.asarray(self._processor.encode(text), np.int32)
        # Spelled out in bytes, a literal space mark survives decoding.
        ids = [[*self._space_mark_ids, *part] for part in self._processor.encode(text.split(_SPACE_MARK))]
        return np.asarray(list(itertools.chain(*ids))[len(self._space_mark_ids) :], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; BOS and other control pieces, and ids beyond the vocabulary, are skipped."""
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])


def load_tokenizer(spec: str | os.PathLike) -> Tokenizer:
    """The tokenizer that `spec` names: "bytes", or a path that ends in ".model". Raises UserError otherwise."""
    if spec == "bytes":
        return ByteTokenizer()
    if os.fspath(spec).endswith(".model"):
        return SentencePieceTokenizer(spec)
    raise UserError(f"tokenizer {os.fspath(spec)!r}: unknown; legal: {LEGAL_SPECS}")


def train_sentencepiece(texts: Iterable[str], vocab_size: int, output_path: str | os.PathLike) -> None:
    """Learns a BPE vocabulary with byte fallback, in which every text is encodable and decodes to itself.

    Reads every text once, keeps a uniform sample of their lines in memory, and gives the same model every time.
    Raises UserError if `vocab_size` does not suit the texts; then, no file is written.
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
            # Nothing may be normalised away: source code is not the same with other white space.
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
    """Iterates over the lines of texts. The C++ trainer takes an exception for the end, so it is kept for later."""

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
        for text in texts:
            for line in text.splitlines():
                for start in range(0, len(line), _MAX_LINE_CHARACTERS):
                    yield line[start : start + _MAX_LINE_CHARACTERS]


def _training_error(lines: _TrainingLines, vocab_size: int, error: Exception) -> BaseException:
    if lines.error:
        return lines.error
    if not lines.count:
        return UserError("tokenizer train: there is no text to train on; legal: at least one line that is not empty")
    if found := re.search(r"value <= (\d+)", str(error)):
        return UserError(f"tokenizer train:{vocab_size}: the text supports a vocabulary of at most {found[1]}")
    if found := re.search(r"\d+ vs (\d+)", str(error)):
        return UserError(f"tokenizer train:{vocab_size}: the text needs a vocabulary of at least {found[1]}")
    return UserError(f"tokenizer train:{vocab_size}: SentencePiece refuses it ({' '.join(str(error).split())})")
