"""What commands write: made whole or not at all, and one line where the disk refuses."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ttt_e2e.errors import UserError

# By these files other programs know that a directory is whole.
_MARKS = ("zarr.json", "config.json")
# The root of a new file system has it.
_NOT_COUNTED = "lost+found"


def is_free(output: str | os.PathLike) -> bool:
    """Whether nothing is at `output`, or an empty directory."""
    output = Path(output)
    return not output.exists() or (output.is_dir() and not _contents(output))


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Makes a `UserError`, naming `path`, of an OSError of the `with` block: a full disk is no defect of ours."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{os.fspath(path)} cannot be written ({where}{error.strerror or error})") from None


@contextlib.contextmanager
def new_directory(output: str | os.PathLike) -> Iterator[Path]:
    """Gives a new directory that is `output` when the `with` block ends, and is removed if an exception ends it.

    An empty directory that is at `output` is filled, as it may be a link or a mount point; so is one that a link only
    names. Raises UserError where it cannot be written, or `output` is not free at the end.
    """
    target = Path(os.path.realpath(output))
    fills = target.is_dir()
    parent = target if fills else target.parent
    partial = parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    with writing(output):
        parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            yield partial
            if not fills:
                partial.rename(target)
                return
            if others := [path.name for path in _contents(target) if path != partial]:
                raise UserError(f"output {os.fspath(output)}: another program has made {others[0]} there meanwhile")
            for path in sorted(partial.iterdir(), key=lambda path: path.name in _MARKS):
                path.rename(target / path.name)
            partial.rmdir()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _contents(directory: Path) -> list[Path]:
    """What is in a directory."""
    return [path for path in directory.iterdir() if path.name != _NOT_COUNTED]
