"""Finds and reads documents: plain text, Markdown, Python source, JSON lines, and the embedded corpus.

A document is a whole file, or one line of a `.jsonl` file. One document at a time is in memory.
"""

import glob
import gzip
import io
import json
import os
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ttt_e2e.errors import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
LEGAL_INPUTS = f"'stdlib', or a file, directory or glob of {' '.join(SUFFIXES)}, each plain or with .gz appended"

# Names of what is no library code, is vendored, or differs from one build of the interpreter to the next.
_STDLIB_EXCLUDED = re.compile(
    r"test|tests|site-packages|dist-packages|idlelib|lib2to3|turtledemo|ensurepip|__pycache__|lib-dynload"
    r"|config-.*|_sysconfigdata.*"
)


@dataclass(frozen=True)
class Document:
    """One text. `name` is its path relative to the corpus, with "/" between parts; for JSON lines, with ":LINE"."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Document files below `root`, by sorted relative names. Iterating it reads their documents one at a time.

    It can be iterated repeatedly. Raises UserError, naming file and line, where a file is damaged or not UTF-8, or a
    line is not JSON or has no `text`.
    """

    root: Path
    names: tuple[str, ...]

    def __iter__(self) -> Iterator[Document]:
        for name in self.names:
            yield from _read(self.root / name, name)

    def num_bytes(self) -> int:
        """Total size of the files on disk, compressed where they are."""
        return sum((self.root / name).stat().st_size for name in self.names)


def standard_library() -> Corpus:
    """The Python sources of the running interpreter's standard library, without its tests: about 10 MB of code."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (name for name in _names_below(root, _STDLIB_EXCLUDED) if name.endswith(".py"))
    return Corpus(root, tuple(names))


def find_documents(input_spec: str | os.PathLike) -> Corpus:
    """Finds the documents of "stdlib", a file, a directory (all supported files below it), or a glob.

    Raises UserError if nothing matches, or if a named or matched file has an unsupported suffix.
    """
    spec = os.path.expanduser(os.fspath(input_spec))
    if spec == "stdlib":
        return standard_library()
    if os.path.isdir(spec):
        root, names = Path(spec), [name for name in _names_below(Path(spec)) if _kind(name)]
    elif os.path.isfile(spec):
        root, names = Path(spec).parent, [Path(spec).name]
    else:
        # Names are relative to the last directory before a wildcard, so that they do not depend on what matches.
        root = Path(re.split(r"[*?\[]", spec, maxsplit=1)[0] + "x").parent
        matches = (Path(match) for match in glob.iglob(spec, recursive=True))
        names = sorted(match.relative_to(root).as_posix() for match in matches if match.is_file())
    if not names:
        raise UserError(f"input {spec!r}: no document found; legal: {LEGAL_INPUTS}")
    for name in names:
        if not _kind(name):
            raise UserError(f"input {root / name}: unsupported suffix {Path(name).suffix!r}; legal: {LEGAL_INPUTS}")
    return Corpus(root, tuple(names))


def _names_below(root: Path, excluded: re.Pattern = re.compile("(?!)")) -> list[str]:
    """Sorted relative names of all files below `root`, without files and directories whose name matches `excluded`."""
    names = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not excluded.fullmatch(name)]
        below = Path(directory).relative_to(root)
        names += [(below / file).as_posix() for file in files if not excluded.fullmatch(file)]
    return sorted(names)


def _kind(name: str) -> str:
    """The suffix, without .gz, that says how to read a file; "" where it is not supported."""
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else ""


def _read(path: Path, name: str) -> Iterator[Document]:
    """Reads the documents of one file. Raises UserError where it is damaged or cannot be read."""
    try:
        with gzip.open(path, "rb") if name.endswith(".gz") else path.open("rb") as file:
            if _kind(name) == ".jsonl":
                yield from _read_json_lines(file, path, name)
            else:
                yield Document(name, _decode(file.read(), path, is_python=_kind(name) == ".py"))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _decode(data: bytes, path: Path, is_python: bool) -> str:
    """Decodes a whole file, with line ends as they are. Python sources may declare an encoding; others are UTF-8.

    Raises UserError, naming the line, for bytes that are not valid in the encoding.
    """
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0] if is_python else "utf-8-sig"
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: byte {data[error.start]:#04x} is not valid {error.encoding}") from None
    except SyntaxError as error:
        raise UserError(f"{path}: {error.msg}; legal: UTF-8, or an encoding declared as Python does") from None


def _read_json_lines(file: BinaryIO, path: Path, name: str) -> Iterator[Document]:
    """Reads the field `text` of each line, a JSON object. Raises UserError, naming the line, where there is none."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a line of JSON in UTF-8 ({error})") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{path}:{number}: no string "text"; legal: one object a line, as {{"text": "..."}}')
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f'{path}:{number}: "text" has half of a surrogate pair, which is no character') from None
        yield Document(f"{name}:{number}", text)
