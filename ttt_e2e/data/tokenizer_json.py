"""Encodes text by a `tokenizer.json`, the file in which Hugging Face's models have their tokenizers."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from ttt_e2e.data.pieces import cut
from ttt_e2e.errors import JSON_ERRORS, UserError

CONFIG_NAME = "tokenizer_config.json"

# What models call the token before a text and that after it, where no `tokenizer_config.json` says so.
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[BOS]", "<|endoftext|>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "[EOS]")

# The regular expressions that cut a text into words in GPT-2, GPT-4 (cl100k), Llama 3, Qwen 2 and GPT-4o (o200k). In
# none of them does a word have white space after a letter or digit, nor looks behind its own beginning.
_WORDS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_SPACE_MARKS = "\u2581\u0120"  # what stands for a space in pieces of characters, and of bytes
_END_OF_WORD = re.compile(r"(?<=[^\W_])(?=[ \n])")


class JsonTokenizer:
    """Encodes text by a `tokenizer.json`, local or in a bucket.

    Its BOS and EOS are those of a `tokenizer_config.json` beside it, or else the tokens that it puts before and after a
    text, or that have one of the usual names. Text that reads like a special token is encoded as the text it is. Raises
    UserError if the file is missing or damaged, or has no BOS, and where the library `tokenizers` is not installed.
    """

    def __init__(self, path: str | os.PathLike):
        path = epath.Path(path)
        content = _read(path)
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(
                f"tokenizer {path}: reading it takes tokenizers: pip install 'ttt-e2e[huggingface]'"
            ) from None
        try:
            self._spec = json.loads(content)
            self._tokenizer = Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises Exception itself
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"tokenizer {path}: not a tokenizer.json of Hugging Face ({reason})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        before, after = self._around_a_text()
        config = _config_beside(path)
        self.bos_id = self._special(path, "bos_token", config, before, _BOS_NAMES)
        self.eos_id = self._special(path, "eos_token", config, after, _EOS_NAMES)
        self.unknown_id = self._ids.get(self._spec["model"].get("unk_token"), -1)
        if self.bos_id < 0:
            raise UserError(f"tokenizer {path}: it names no BOS; legal: a {CONFIG_NAME} beside it that has bos_token")
        self.fingerprint = hashlib.blake2b(content + f"{self.bos_id}".encode(), digest_size=8).hexdigest()
        # Last, as it would keep the names of special tokens from being found.
        self._tokenizer.encode_special_tokens = True
        self._end_of_word = _END_OF_WORD if _is_cut_into_words(self._spec) else None

    def encode(self, text: str) -> np.ndarray:
        """Encodes `text` as token ids, int32 [num_tokens], without BOS."""
        parts = [
            np.asarray(self._tokenizer.encode(part, add_special_tokens=False).ids, np.int32)
            for part in cut(text, self._end_of_word)
        ]
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes `ids` to text; special tokens, such as BOS, and ids outside the vocabulary are skipped."""
        return self._tokenizer.decode([int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True)

    def num_bytes(self, *, first: bool = False) -> np.ndarray:
        """Counts the UTF-8 bytes of the text of each id, [vocab_size].

        If the tokenizer normalises a text, so do the counts.

        first: of the first id of a text, without the space that some tokenizers put there.
        """
        added = {token["id"]: token for token in self._spec.get("added_tokens", [])}
        is_byte_level = any(part.get("type") == "ByteLevel" for part in _parts_of(self._spec))
        has_bytes = bool(self._spec["model"].get("byte_fallback"))
        counts = np.zeros(self.vocab_size, np.int64)
        for piece, i in self._ids.items():
            if i in added:
                counts[i] = 0 if added[i]["special"] else len(piece.encode())
            elif is_byte_level:
                counts[i] = len(piece)  # each character of the alphabet of bytes stands for one
            elif has_bytes and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
                counts[i] = 1
            else:
                counts[i] = len(piece.replace(_SPACE_MARKS[0], " ").encode())
        unknown = self._spec["model"].get("unk_token")
        if unknown in self._ids:
            counts[self._ids[unknown]] = 0
        if first and counts[self.encode("a")].sum() == 2:
            begins_with_space = [i for piece, i in self._ids.items() if piece[0] in _SPACE_MARKS and i not in added]
            counts[begins_with_space] -= 1
        return counts

    def _around_a_text(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer itself puts before a text, and those it puts after."""
        encoding = self._tokenizer.encode("a", add_special_tokens=True)
        is_text = [not special for special in encoding.special_tokens_mask]
        if not any(is_text):
            return encoding.ids, []
        first, last = is_text.index(True), len(is_text) - is_text[::-1].index(True)
        return encoding.ids[:first], encoding.ids[last:]

    def _special(self, path, name: str, config: dict, around: list[int], usual: Iterable[str]) -> int:
        """The id of the special token `name`, or -1. Raises UserError where the config has one that is no token."""
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            if token not in self._ids:
                raise UserError(
                    f"tokenizer {path}: {CONFIG_NAME} beside it has {name} {token!r}, which is no token of it"
                )
            return self._ids[token]
        if around:
            return around[0]
        special = {added["content"] for added in self._spec.get("added_tokens", []) if added["special"]}
        return next((self._ids[token] for token in usual if token in special), -1)


def is_tiktoken(content: bytes) -> bool:
    """Whether a file is a table of tiktoken's, as Llama 3's `tokenizer.model`: lines of base64 and a rank."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content) is not None


def _read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path}: cannot be read ({error.strerror or error})") from None


def _config_beside(path: epath.Path) -> dict[str, Any]:
    """What the `tokenizer_config.json` beside `path` has; {} if there is none."""
    beside = path.parent / CONFIG_NAME
    if not beside.exists():
        return {}
    try:
        config = json.loads(_read(beside))
    except JSON_ERRORS as error:
        raise UserError(f"tokenizer {path}: {CONFIG_NAME} beside it is no JSON ({error})") from None
    return config if isinstance(config, dict) else {}


def _parts_of(spec: dict) -> Iterator[dict]:
    """The parts of a tokenizer, those in sequences too."""
    waiting = [spec.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while waiting:
        part = waiting.pop()
        if part:
            yield part
            for several in ("normalizers", "pretokenizers", "decoders"):
                waiting += part.get(several, [])


def _is_cut_into_words(spec: dict) -> bool:
    """Whether the tokens of a text are those of its two parts, wherever it is cut between a letter and white space.

    They are if it is cut into words there before anything else is done: by a known regular expression, with no
    normaliser but NFC, which composes nothing with white space, and no added token across such a place or that depends
    on what is beside it.
    """
    normalizer = spec.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":
        return False
    for token in spec.get("added_tokens", []):
        looks_around = token["lstrip"] or token["rstrip"] or token["single_word"]
        if not token["special"] and (looks_around or _END_OF_WORD.search(token["content"])):
            return False
    words = spec.get("pre_tokenizer") or {}
    first = words["pretokenizers"][0] if words.get("type") == "Sequence" and words["pretokenizers"] else words
    if first.get("type") == "ByteLevel":
        return first.get("use_regex", True)
    regex = first.get("pattern", {}).get("Regex")
    return first.get("type") == "Split" and first["behavior"] == "Isolated" and not first["invert"] and regex in _WORDS
