"""Finds the documents of a corpus: files, directories and globs, and the embedded corpus."""

import fnmatch
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

NO_SUFFIX = "no suffix"
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
    left_out: dict[str, int] = field(default_factory=dict)  # number of files by suffix, or by why they are none
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

    def sizes(self) -> list[int]:
        """Size of each file on disk, compressed where it is. Raises UserError where one is gone."""
        try:
            return [path.stat().st_size for path, _ in self.files]
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def standard_library() -> Corpus:
    """The Python sources of the running interpreter's standard library, without its tests: about 10 MB of code."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = _below(root, _STDLIB_EXCLUDED)
    names = sorted(name for name, what in found.items() if name.endswith(".py") and not what)
    return Corpus("stdlib", tuple((root / name, name) for name in names))


def find_documents(
    inputs: str | os.PathLike | Sequence[str], *, text_field: str = "text", skips_bad_records: bool = False
) -> Corpus:
    """Finds the documents of one or more inputs, in their order, each file once.

    An input is "stdlib", a file, a directory (all supported files below it), or a glob; a string may hold several, with
    commas between. Links are followed. Hidden files, broken links and pipes are left out, and counted. Raises UserError
    if an input matches nothing, names or matches a file of an unsupported suffix, or names a broken link or a pipe.
    """
    specs = split_inputs([inputs] if isinstance(inputs, str | os.PathLike) else inputs)
    files, left_out = {}, Counter()
    for spec in specs:
        found = _find(spec)
        left_out.update(found.left_out)
        for path, name in found.files:
            files.setdefault(os.path.realpath(path), (path, name))
    return Corpus(",".join(specs), tuple(files.values()), dict(sorted(left_out.items())), text_field, skips_bad_records)


def split_inputs(inputs: Sequence[str | os.PathLike]) -> list[str]:
    """Divides inputs at commas, other than in the name of a file that exists."""
    inputs = [os.fspath(each) for each in inputs]
    divided = ([each] if os.path.exists(each) else each.split(",") for each in inputs)
    return [os.path.normpath(spec) for specs in divided for spec in specs if spec]  # a/ and ./a are a


def _find(spec: str) -> Corpus:
    """Finds the documents of one input."""
    if spec == "stdlib":
        return standard_library()
    if os.path.isdir(spec):
        root, found = Path(spec), _below(Path(spec))
        found = {name: what or ("" if kind(name) else suffix(name) or NO_SUFFIX) for name, what in found.items()}
    elif os.path.lexists(spec) and (what := _irregular(spec)):
        raise UserError(f"input {spec!r}: is a {what}; legal: {LEGAL_INPUTS}")
    elif os.path.isfile(spec):
        root, found = Path(spec).parent, {Path(spec).name: ""}
    else:
        # Names are relative to the last directory before a wildcard, so that they do not depend on what matches.
        start = re.split(r"[*?\[]", spec, maxsplit=1)[0].rfind("/") + 1
        root, patterns = Path(spec[:start]), [part for part in spec[start:].split("/") if part]
        if "**" in patterns:  # for which `glob` goes around in a loop of links, in all ways that there are
            found = {name: what for name, what in _below(root).items() if _matches(name.split("/"), patterns)}
        else:
            matches = [match for match in glob.iglob(spec) if not os.path.isdir(match)]
            found = {Path(match).relative_to(root).as_posix(): _irregular(match) for match in matches}
    left_out = Counter(what for _, what in sorted(found.items()) if what)
    names = sorted(name for name, what in found.items() if not what)
    if not names:
        others = f" (but {counted(left_out)})" if left_out else ""
        raise UserError(f"input {spec!r}: no document found{others}; legal: {LEGAL_INPUTS}")
    for name in names:
        if not kind(name):
            raise UserError(f"input {root / name}: unsupported suffix {suffix(name)!r}; legal: {LEGAL_INPUTS}")
    return Corpus(spec, tuple((root / name, name) for name in names), left_out)


def counted(left_out: dict[str, int]) -> str:
    """What was left out in words: "3 files of .png, 1 file of no suffix, 2 x broken link"."""

    def words(name: str, count: int) -> str:
        is_suffix = name.startswith(".") or name in ("", NO_SUFFIX)
        files = "file" if count == 1 else "files"
        return f"{count} {files} of {name or NO_SUFFIX}" if is_suffix else f"{count} x {name}"

    return ", ".join(words(name, count) for name, count in left_out.items())


def _below(root: Path, excluded: re.Pattern = re.compile("(?!)")) -> dict[str, str]:
    """Relative names of all files below `root`, without files and directories whose name matches `excluded`.

    As in a glob, links are followed, and what begins with a dot is hidden. Each directory is read once, so that loops
    of links end. Returns why a name is left out ("hidden", "broken link", ...), "" for a file that is not. Raises
    UserError for a directory that cannot be read.
    """

    def refuse(error: OSError):
        raise UserError(f"input {error.filename}: cannot be read ({error.strerror})")

    found, read = {}, set()
    for directory, subdirectories, files in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(directory)) in read:
            subdirectories.clear()
            continue
        read.add(real)
        below = Path(directory).relative_to(root)
        hidden = [name for name in files + subdirectories if name.startswith(".") and not excluded.fullmatch(name)]
        found |= dict.fromkeys(((below / name).as_posix() for name in hidden), "hidden")
        for name in files:
            if not (name.startswith(".") or excluded.fullmatch(name)):
                found[(below / name).as_posix()] = _irregular(os.path.join(directory, name))
        # Sorted, so that of two ways to a directory it is always the same that is taken.
        subdirectories[:] = sorted(name for name in subdirectories if not (name in hidden or excluded.fullmatch(name)))
    return found


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """Whether the parts of a name match those of a glob, in which "**" is any number of parts."""
    if not patterns or patterns[0] != "**":
        first = bool(parts) and bool(patterns) and fnmatch.fnmatchcase(parts[0], patterns[0])
        return _matches(parts[1:], patterns[1:]) if first else not (parts or patterns)
    return _matches(parts, patterns[1:]) or (bool(parts) and _matches(parts[1:], patterns))


def _irregular(path: str) -> str:
    """What is at `path` if no file, nor a directory: reading a pipe would wait for ever. "" for a file."""
    if os.path.isfile(path) or os.path.isdir(path):
        return ""
    return "broken link" if os.path.islink(path) and not os.path.exists(path) else "pipe, socket or device"
