"""Reads and writes token stores: Zarr v3 groups with one 1-D array of unsigned integers per split, by TensorStore.

A store may also refer to others, its parts, whose tokens one after the other are its own (attribute `parts`). Paths are
local, or URLs that TensorStore supports (`gs://`, `s3://`). T is the sequence length: sequence n is the T + 1
tokens from n*T to n*T + T. Neighbours share one token, which is the last target of one and the first input of the next.
"""

import contextlib
import hashlib
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from ttt_e2e.errors import JSON_ERRORS, UserError
from ttt_e2e.strict_json import to_json

LEGAL_PATHS = "a directory made by `ttt-e2e prepare`, or the gs:// or s3:// URL of a Zarr v3 group of such a layout"

_CACHE_BYTES = 128 << 20
_CHUNK_TOKENS = 2**18
_DTYPES = ("uint8", "uint16", "uint32", "uint64")
_INT32_IDS = 2**31
# Attributes that `prepare` writes and that are read again, with their types; other programs' stores may lack them.
_ATTRIBUTES = {
    "tokenizer": str,
    "vocab_size": int,
    "bos_id": int,
    "num_tokens": dict,
    "parts": list,
    "prepared_from": dict,
}


class TokenStore:
    """One split of a token store, opened for reading by `TokenStore.open`. Pickled as its path and split."""

    def __init__(self, path: str, split: str, array: ts.TensorStore, attributes: dict[str, Any]):
        self.path = path
        self.split = split
        self.attributes = attributes
        self.num_tokens = int(array.shape[0])
        self._array = array

    @classmethod
    def open(cls, path: str | os.PathLike, split: str) -> "TokenStore":
        """Opens `split` of the store at `path`; reads metadata only.

        Raises UserError if the store or the split is missing, or its metadata is damaged or of another layout.
        """
        path = os.fspath(path)
        attributes = read_attributes(path)
        array = _open_parts(path, split, attributes) if "parts" in attributes else _open_array(path, split, _context())
        if array.shape[0] == 0:
            raise UserError(f"{path}/{split}: is empty; prepare the store again from a larger input")
        if (recorded := attributes.get("num_tokens", {}).get(split, array.shape[0])) != array.shape[0]:
            raise UserError(
                f"{path}/{split}: damaged metadata (it has {array.shape[0]} tokens, {path}/zarr.json says {recorded});"
                " copy or prepare the store again"
            )
        return cls(path, split, array, attributes)

    def __reduce__(self):
        return TokenStore.open, (self.path, self.split)

    @property
    def fingerprint(self) -> str:
        """Digest, 16 hex digits, of the attributes, split, size and dtype. No token is read.

        The attributes of a store made by `prepare` include a digest of all its tokens.
        """
        # Where its parts lie is nothing to the store.
        attributes = {name: value for name, value in self.attributes.items() if name != "parts"}
        identity = [attributes, self.split, self.num_tokens, self._array.dtype.name]
        return hashlib.blake2b(to_json(identity, sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def tokenizer_spec(self) -> str:
        """The argument of `load_tokenizer` for the tokenizer that made the store; "" if the store does not name it."""
        return tokenizer_spec(self.path, self.attributes)

    def num_sequences(self, seq_len: int) -> int:
        """Number of whole sequences of `seq_len` inputs and targets. Raises UserError if there is none."""
        if self.num_tokens < seq_len + 1:
            raise UserError(
                f"{self.path}/{self.split}: has {self.num_tokens} tokens, a sequence takes seq_len + 1 = {seq_len + 1};"
                f" legal: seq_len <= {self.num_tokens - 1}, or a larger store"
            )
        return (self.num_tokens - 1) // seq_len

    def sequences(self, indices: Sequence[int] | np.ndarray, seq_len: int, vocab_size: int = _INT32_IDS) -> np.ndarray:
        """Reads sequences by their indices, concurrently: int32 [len(indices), seq_len + 1].

        Raises UserError if the store is damaged or has a token id that is not below `vocab_size`, and IndexError if an
        index is out of range.
        """
        count = self.num_sequences(seq_len)
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < count):
            raise IndexError(f"sequence {indices.min()} to {indices.max()} of {count}")
        return self._read((indices * seq_len).tolist(), seq_len + 1, vocab_size)

    def stretch(self, start: int, stop: int, vocab_size: int = _INT32_IDS) -> np.ndarray:
        """Reads tokens `start` to `stop` - 1, int32 [stop - start]. Raises the errors of `sequences`."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        return self._read([start], stop - start, vocab_size)[0]

    def _read(self, starts: list[int], length: int, vocab_size: int) -> np.ndarray:
        """Reads `length` tokens from each of `starts` on, concurrently: int32 [len(starts), length]."""
        reads = [self._array[start : start + length].read() for start in starts]
        tokens = np.empty((len(reads), length), self._array.dtype.numpy_dtype)
        try:
            for row, read in zip(tokens, reads):
                row[:] = read.result()
        except ValueError as error:
            raise UserError(
                f"{self.path}/{self.split}: damaged data ({_reason(error)}); copy or prepare the store again"
            ) from None
        check_range(tokens, min(vocab_size, _INT32_IDS), f"{self.path}/{self.split}")
        return tokens.astype(np.int32)


def check_range(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """Raises UserError, naming `where`, if a token id is not below `vocab_size`: it would be embedded as another."""
    if tokens.size and (highest := int(tokens.max())) >= vocab_size:
        raise UserError(
            f"{where}: token id {highest} is not below vocab_size {vocab_size};"
            " legal: a vocab_size above every id, or a store made with the model's own tokenizer"
        )


class TokenWriter:
    """Writes a new split of unknown length; one chunk of `chunk_tokens` is in memory.

    `num_tokens` is the number of tokens appended; `digest`, after `close`, is a hash of all of them.
    """

    def __init__(self, path: str | os.PathLike, split: str, vocab_size: int, chunk_tokens: int = _CHUNK_TOKENS):
        metadata = {
            "shape": [0],
            "data_type": "uint16" if vocab_size <= 2**16 else "uint32",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk_tokens]}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd", "configuration": {"level": 3}},
                {"name": "crc32c"},
            ],
        }
        spec = {
            "driver": "zarr3",
            "kvstore": _kvstore(os.fspath(path), split),
            "metadata": metadata,
            # Readers take a missing chunk for damage, so a chunk of nothing but token 0 must be written too.
            "store_data_equal_to_fill_value": True,
        }
        with _writing(path):
            self._array = ts.open(spec, create=True).result()
        self._buffer = np.empty(chunk_tokens, self._array.dtype.numpy_dtype)
        self._filled = 0
        self._hash = hashlib.blake2b(digest_size=8)
        self._vocab_size = vocab_size
        self._where = f"{os.fspath(path)}/{split}"
        self.num_tokens = 0

    @property
    def digest(self) -> str:
        """Hash, 16 hex digits, of the tokens that were written out so far; those in the buffer are not included."""
        return self._hash.hexdigest()

    def append(self, tokens: np.ndarray) -> None:
        """Appends tokens, integers [n]. Raises UserError for an id that is not below the vocabulary's size."""
        tokens = np.asarray(tokens)
        check_range(tokens, self._vocab_size, self._where)
        while tokens.size:
            count = min(tokens.size, self._buffer.size - self._filled)
            self._buffer[self._filled : self._filled + count] = tokens[:count]
            self._filled += count
            self.num_tokens += count
            tokens = tokens[count:]
            if self._filled == self._buffer.size:
                self._flush()

    def close(self) -> None:
        """Writes the last chunk, if it has tokens that were not written yet."""
        if self._filled:
            self._flush()

    def _flush(self) -> None:
        block = self._buffer[: self._filled]
        self._hash.update(block.tobytes())
        with _writing(self._where):
            self._array = self._array.resize(exclusive_max=[self.num_tokens]).result()
            self._array[self.num_tokens - self._filled : self.num_tokens].write(block).result()
        self._filled = 0


def read_attributes(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the attributes of the store at `path`. Raises UserError where there is none, or its metadata is damaged."""
    path = os.fspath(path)
    content = _read_key(path, "zarr.json")
    if content is None:
        tried = "" if "://" in path or os.path.isabs(path) else f" in {os.path.abspath(path)}"
        raise UserError(f"{path}: no token store there (no zarr.json{tried}); legal: {LEGAL_PATHS}")
    try:
        group = json.loads(content)
        attributes = group.get("attributes", {})
        if group["zarr_format"] != 3 or group["node_type"] != "group" or not isinstance(attributes, dict):
            raise ValueError("no Zarr v3 group")
        for name, kind in _ATTRIBUTES.items():
            if name in attributes and type(attributes[name]) is not kind:
                raise ValueError(f"attribute {name} is {attributes[name]!r}, but it takes {kind.__name__}")
    except (*JSON_ERRORS, KeyError, AttributeError, TypeError) as error:  # what `json` and indexing raise
        raise UserError(f"{path}/zarr.json: damaged metadata ({error}); legal: {LEGAL_PATHS}") from None
    return attributes


def tokenizer_spec(path: str, attributes: dict[str, Any]) -> str:
    """The argument of `load_tokenizer` for the tokenizer of a store with these attributes; "" if they name none."""
    spec = attributes.get("tokenizer", "")
    return spec if spec in ("", "bytes") else f"{path.rstrip('/')}/{spec}"


def _context() -> ts.Context:
    """The cache of one store, which its parts share."""
    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})


def _open_array(path: str, split: str, context: ts.Context) -> ts.TensorStore:
    """Opens the array of a split. Raises UserError if it is missing, damaged, or no array of tokens."""
    where = f"{path}/{split}"
    metadata = _read_key(path, f"{split}/zarr.json")
    if metadata is None:
        raise UserError(f"{path}: no split {split!r}; it has {', '.join(_splits(path)) or 'none at all'}")
    try:
        json.loads(metadata)  # TensorStore ends the process where it is nested too deep
    except JSON_ERRORS as error:
        raise UserError(f"{where}: damaged metadata ({error})") from None
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(path, split),
        # A missing chunk is a damaged store, not a run of token 0.
        "fill_missing_data_reads": False,
        # Stores do not change, so cached data need not be compared with the disk or the bucket again.
        "recheck_cached_data": "open",
    }
    try:
        array = ts.open(spec, read=True, context=context).result()
    except ValueError as error:
        raise UserError(f"{where}: damaged metadata ({_reason(error)})") from None
    if array.ndim != 1 or array.dtype.name not in _DTYPES:
        kind = f"{array.ndim}-D array of {array.dtype.name}"
        raise UserError(f"{where}: is a {kind}; legal: a 1-D array of {' or '.join(_DTYPES)}")
    return array


def _open_parts(path: str, split: str, attributes: dict[str, Any]) -> ts.TensorStore:
    """Opens a split of a store that refers to parts: their arrays one after the other, those that are not empty.

    Raises UserError if a part is missing, or is not the one that was merged.
    """
    arrays, context = [], _context()
    for number, part in enumerate(attributes["parts"]):
        try:
            where = _relative_to(path, part["path"])
            num_tokens, digest = part["num_tokens"].get(split, 0), part["digest"].get(split)
        except (TypeError, KeyError, AttributeError):
            raise UserError(f"{path}/zarr.json: damaged metadata (parts); merge the store again") from None
        if not num_tokens:
            continue
        theirs = read_attributes(where)
        array = _open_array(where, split, context)
        their_digest = theirs.get("digest")
        is_same = isinstance(their_digest, dict) and their_digest.get(split) == digest
        if not is_same or array.shape[0] != num_tokens:
            raise UserError(f"{where}: is not the part {number} that {path} was merged from; merge the store again")
        arrays.append(array)
    if not arrays:
        known = sorted({name for part in attributes["parts"] for name, number in part["num_tokens"].items() if number})
        raise UserError(f"{path}: no split {split!r}; it has {', '.join(known) or 'none at all'}")
    return ts.concat(arrays, axis=0)


def _relative_to(path: str, part: str) -> str:
    """The path or URL of a part, which is relative to the store at `path`."""
    scheme, separator, place = path.rpartition("://")
    return scheme + separator + posixpath.normpath(posixpath.join(place, part))


def write_attributes(path: str | os.PathLike, attributes: dict[str, Any]) -> None:
    """Makes `path` a Zarr v3 group with `attributes`. It is written last: a store without it is not complete."""
    group = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    with _writing(path):
        ts.KvStore.open(_kvstore(os.fspath(path))).result().write("zarr.json", to_json(group, indent=2)).result()


@contextlib.contextmanager
def _writing(path: str | os.PathLike) -> Iterator[None]:
    """Makes a UserError, naming `path`, of what TensorStore raises where it cannot write."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{os.fspath(path)} cannot be written ({_reason(error)})") from None


def _kvstore(path: str, key: str = "") -> Any:
    """TensorStore's specification of the directory `key` below a local path or URL."""
    if "://" in path:
        return f"{path.rstrip('/')}/{key}"
    # Not a file:// URL: there, some characters that are legal in a path would need quoting.
    return {"driver": "file", "path": f"{os.path.abspath(path)}/{key}/".replace("//", "/")}


def _read_key(path: str, key: str) -> bytes | None:
    """Reads the bytes of the file `key` below `path`; None where there is no such file."""
    try:
        read = ts.KvStore.open(_kvstore(path)).result().read(key).result()
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); legal: {LEGAL_PATHS}") from None
    return None if read.state == "missing" else read.value


def _splits(path: str) -> list[str]:
    """Names of the arrays in a store. Slow, as it lists every chunk; used for error messages only."""
    keys = (key.decode() for key in ts.KvStore.open(_kvstore(path)).result().list().result())
    return sorted(key.removesuffix("/zarr.json") for key in keys if key.endswith("/zarr.json"))


def _reason(error: Exception) -> str:
    """The message of a TensorStore error on one line, without the specification at its end."""
    return " ".join(str(error).split(" [tensorstore_spec")[0].split())
