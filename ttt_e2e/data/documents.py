"""Finds the documents of a corpus: files, directories and globs, and the embedded corpus."""

import glob
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ttt_e2e.data.readers import LEGAL_SUFFIXES, Document, kind, read, suffix
from ttt_e2e.errors import UserError

LEGAL_INPUTS = f"'stdlib', or a file, directory or glob of {LEGAL_SUFFIXES}"

# Names of what is no library code, is vendored, or differs from one build of the interpreter to the next.
_STDLIB_EXCLUDED = re.compile(
    r"test|tests|site-packages|dist-packages|idlelib|lib2to3|turtledemo|ensurepip|__pycache__|lib-dynload"
    r"|config-.*|_sysconfigdata.*"
)


@dataclass
class Skipped:
    """Records that were skipped: how many, and what was wrong with the first."""

    count: int = 0
    first: str = ""


@dataclass(frozen=True)
class Corpus:
    """Document files, each a path and its name. Iterating it reads their documents one at a time, and repeatedly.

    `text_field` is the field of a record that has its text, "a.b" for one in another. Raises UserError, naming file and
    line, where a file is damaged or a record is bad: not UTF-8, no JSON, or without the field. With `skips_bad_records`
    it skips bad records.
    """

    spec: str
    files: tuple[tuple[Path, str], ...]
    left_out: dict[str, int] = field(default_factory=dict)  # number of files of unsupported suffixes, by suffix
    text_field: str = "text"
    skips_bad_records: bool = False

    def __iter__(self) -> Iterator[Document]:
        return self.documents(Skipped())

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        """Reads the documents, and counts in `skipped` the records that it skips."""
        for path, name in self.files:
            for document in read(path, name, self.text_field):
                if isinstance(document, Document):
                    yield document
                elif self.skips_bad_records:
                    skipped.count += 1
                    skipped.first = skipped.first or document.reason
                else:
                    raise UserError(document.reason)

    def num_bytes(self) -> int:
        """Total size of the files on disk, compressed where they are."""
        return sum(path.stat().st_size for path, _ in self.files)


def standard_library() -> Corpus:
    """The Python sources of the running interpreter's standard library, without its tests: about 10 MB of code."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = (name for name in _names_below(root, _STDLIB_EXCLUDED) if name.endswith(".py"))
    return Corpus("stdlib", tuple((root / name, name) for name in names))


def find_documents(
    inputs: str | os.PathLike | Sequence[str], *, text_field: str = "text", skips_bad_records: bool = False
) -> Corpus:
    """Finds the documents of one or more inputs, in their order, each file once.

    An input is "stdlib", a file, a directory (all supported files below it), or a glob; a string may hold several, with
    commas between. Raises UserError if an input matches nothing, or names or matches a file of an unsupported suffix.
    """
    specs = split_inputs([inputs] if isinstance(inputs, str | os.PathLike) else inputs)
    files, left_out = {}, Counter()
    for spec in specs:
        found = _find(spec)
        left_out.update(found.left_out)
        for path, name in found.files:
            files.setdefault(os.path.abspath(path), (path, name))
    return Corpus(",".join(specs), tuple(files.values()), dict(sorted(left_out.items())), text_field, skips_bad_records)


def split_inputs(inputs: Sequence[str | os.PathLike]) -> list[str]:
    """Divides inputs at commas, other than in the name of a file that exists."""
    inputs = [os.fspath(each) for each in inputs]
    divided = ([each] if os.path.exists(each) else each.split(",") for each in inputs)
    return [os.path.normpath(spec) for specs in divided for spec in specs if spec]  # a/ and ./a are a


def _find(spec: str) -> Corpus:
    """Finds the documents of one input."""
    left_out = Counter()
    if spec == "stdlib":
        return standard_library()
    if os.path.isdir(spec):
        root, all_names = Path(spec), _names_below(Path(spec))
        names = [name for name in all_names if kind(name)]
        left_out.update(suffix(name) for name in all_names if not kind(name))
    elif os.path.isfile(spec):
        root, names = Path(spec).parent, [Path(spec).name]
    else:
        # Names are relative to the last directory before a wildcard, so that they do not depend on what matches.
        root = Path(re.split(r"[*?\[]", spec, maxsplit=1)[0] + "x").parent
        matches = (Path(match) for match in glob.iglob(spec, recursive=True))
        names = sorted(match.relative_to(root).as_posix() for match in matches if match.is_file())
    if not names:
        others = f" (but {counted(left_out)})" if left_out else ""
        raise UserError(f"input {spec!r}: no document found{others}; legal: {LEGAL_INPUTS}")
    for name in names:
        if not kind(name):
            raise UserError(f"input {root / name}: unsupported suffix {suffix(name)!r}; legal: {LEGAL_INPUTS}")
    return Corpus(spec, tuple((root / name, name) for name in names), left_out)


def counted(left_out: dict[str, int]) -> str:
    """Numbers of files by suffix in words: "3 files of .png, 1 of no suffix"."""
    return ", ".join(
        f"{count} {'file' if count == 1 else 'files'} of {name or 'no suffix'}" for name, count in left_out.items()
    )


def _names_below(root: Path, excluded: re.Pattern = re.compile("(?!)")) -> list[str]:
    """Sorted relative names of all files below `root`, without files and directories whose name matches `excluded`."""
    names = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not excluded.fullmatch(name)]
        below = Path(directory).relative_to(root)
        names += [(below / file).as_posix() for file in files if not excluded.fullmatch(file)]
    return sorted(names)
