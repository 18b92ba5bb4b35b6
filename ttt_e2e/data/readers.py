"""Reads the documents of one file: plain text, Markdown, Python source, JSON lines, Parquet; plain, .gz or .zst.

A document is a whole file, a line of a `.jsonl` file, or a row of a `.parquet` file. One document at a time is in
memory; of a Parquet file, the text of one group of rows.
"""

import gzip
import importlib
import io
import json
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ttt_e2e.errors import JSON_ERRORS, UserError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
COMPRESSIONS = (".gz", ".zst")
LEGAL_SUFFIXES = f"{' '.join(TEXT_SUFFIXES)}, each plain or with .gz or .zst appended, or .parquet"

_READ_BYTES = 1 << 18
_ROWS_AT_A_TIME = 256
# The widest window that zstd can have been told to use (`--long=31`); a file with a narrower one takes less memory.
_MAX_ZSTD_WINDOW = 2**31


@dataclass(frozen=True)
class Document:
    """One text. `name` is its path in the corpus, with "/" between parts, and ":LINE" or ":ROW" for a record."""

    name: str
    text: str


@dataclass(frozen=True)
class BadRecord:
    """A document that cannot be read although its file can; `reason` names the place."""

    reason: str


def kind(name: str) -> str:
    """The suffix that says how to read a file, without that of a compression; "" where it is not supported.

    In lower case: `BOOK.TXT` is a text file.
    """
    plain = Path(name.lower())
    if plain.suffix in COMPRESSIONS:
        plain = plain.with_suffix("")
        return plain.suffix if plain.suffix in TEXT_SUFFIXES else ""
    return plain.suffix if plain.suffix in (*TEXT_SUFFIXES, ".parquet") else ""


def suffix(name: str) -> str:
    """What `name` ends in, with the suffix of a compression where there is one: ".csv.gz", or "" for none."""
    path = Path(name.lower())
    return Path(path.stem).suffix + path.suffix if path.suffix in COMPRESSIONS else path.suffix


def read(path: Path, name: str, text_field: str) -> Iterator[Document | BadRecord]:
    """Reads the documents of the file at `path`, which `name` names in the corpus.

    `text_field` is the field of a JSON line or Parquet row that has its text: "a.b" is the field b of the field a.
    Raises UserError where the file is damaged, cannot be read, or takes a library that is not installed.
    """
    try:
        if kind(name) == ".parquet":
            yield from _read_parquet(path, name, text_field)
            return
        with _open(path) as file:
            if kind(name) == ".jsonl":
                yield from _read_json_lines(file, path, name, text_field)
            else:
                yield _read_whole(file, path, name)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower(), "")
        raise UserError(f"{path}: damaged {compression} file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open(path: Path) -> BinaryIO:
    """Opens a file for reading what it holds, decompressed."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdFile(path), _READ_BYTES)
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """The decompressed bytes of a Zstandard file of one or more frames.

    Raises EOFError where the file ends within a frame, which the library's own reader takes for its end.
    """

    def __init__(self, path: Path):
        zstandard = _library("zstandard", path)
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).decompressobj
        self._file = path.open("rb")
        self._frame = None
        self._unread = b""  # compressed
        self._ready = memoryview(b"")  # decompressed

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer) -> int:
        """Fills `buffer`; returns the number of bytes, 0 at the end of the file."""
        while not self._ready:
            data = self._unread or self._file.read(_READ_BYTES)
            if not data:
                if self._frame is None:
                    return 0
                raise EOFError("it ends within a frame: is it cut short?")
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise EOFError(" ".join(str(error).split())) from None
            self._unread = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _library(name: str, path: Path) -> Any:
    """Imports a library of the extra `corpora`. Raises UserError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"{path}: reading it takes {package}: pip install 'ttt-e2e[corpora]'") from None


def _read_whole(file: BinaryIO, path: Path, name: str) -> Document | BadRecord:
    """Reads a whole file, with line ends as they are. Python sources may declare an encoding; others are UTF-8."""
    data = file.read()
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0] if kind(name) == ".py" else "utf-8-sig"
        return Document(name, data.decode(encoding))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return BadRecord(f"{path}:{line}: byte {data[error.start]:#04x} is not valid {error.encoding}")
    except SyntaxError as error:
        return BadRecord(f"{path}: {error.msg}; legal: UTF-8, or an encoding declared as Python does")


def _read_json_lines(file: BinaryIO, path: Path, name: str, text_field: str) -> Iterator[Document | BadRecord]:
    """Reads the text of each line, a JSON object."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except JSON_ERRORS as error:
            yield BadRecord(f"{path}:{number}: not a line of JSON in UTF-8 ({error})")
            continue
        text = record
        for part in text_field.split("."):
            text = text.get(part) if isinstance(text, dict) else None
        if isinstance(text, str):
            yield _checked(text, f"{name}:{number}", f"{path}:{number}", text_field)
        else:
            found = f"it has {_listed(record)}" if isinstance(record, dict) else "it is no object"
            legal = 'one object a line, as {"text": "..."}, and its field by --text_field'
            yield BadRecord(f'{path}:{number}: no string "{text_field}" ({found}); legal: {legal}')


def _checked(text: str, name: str, place: str, text_field: str) -> Document | BadRecord:
    """The document of a text, if it consists of characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return BadRecord(f'{place}: "{text_field}" has half of a surrogate pair, which is no character')
    return Document(name, text)


def _read_parquet(path: Path, name: str, text_field: str) -> Iterator[Document | BadRecord]:
    """Reads the text of each row, one group of rows at a time. Raises UserError where it has no such column of text."""
    arrow, compute, parquet = (_library(f"pyarrow{module}", path) for module in ("", ".compute", ".parquet"))
    try:
        with parquet.ParquetFile(path) as file:
            _check_column(file.schema_arrow, path, text_field, arrow)
            number = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=[text_field]):
                    for scalar in _column(batch, text_field, compute):
                        number += 1
                        yield _row(scalar, f"{name}:{number}", f"{path}:{number}", text_field)
    except (arrow.ArrowException, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.errno else " ".join(str(error).split())
        raise UserError(f"{path}: damaged Parquet file, or cannot be read ({reason})") from None


def _check_column(schema, path: Path, text_field: str, arrow) -> None:
    """Raises UserError unless `text_field` is a column of text in a Parquet file's schema."""
    fields, found = schema, None
    for part in text_field.split("."):
        index = -1 if fields is None else fields.get_field_index(part)
        if index < 0:
            names = _listed({field.name: None for field in schema})
            raise UserError(f'{path}: no column "{text_field}"; it has {names}: choose one by --text_field')
        found = fields.field(index).type
        fields = found if arrow.types.is_struct(found) else None
    text = found.value_type if arrow.types.is_dictionary(found) else found
    if not any(is_text(text) for is_text in (arrow.types.is_string, arrow.types.is_large_string)):
        raise UserError(f'{path}: column "{text_field}" is of {found}; legal: text (string), by --text_field')


def _column(batch, text_field: str, compute) -> Any:
    """The values of a column, which may be a field of a struct, of a batch of rows."""
    first, *others = text_field.split(".")
    column = batch.column(first)
    for part in others:
        column = compute.struct_field(column, part)
    return column


def _row(scalar, name: str, place: str, text_field: str) -> Document | BadRecord:
    """The document of one value of a column of text."""
    try:
        text = scalar.as_py()
    except UnicodeDecodeError as error:
        return BadRecord(f'{place}: "{text_field}" is not valid UTF-8 ({error.reason})')
    return BadRecord(f'{place}: "{text_field}" is null') if text is None else Document(name, text)


def _listed(fields: dict) -> str:
    """The names of a record's fields for a message."""
    names = list(fields)
    return ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "") if names else "no fields"
