"""What commands write: checked before they begin, made whole or not at all, and one line where the disk refuses."""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from ttt_e2e.errors import UserError
from ttt_e2e.paths import in_bucket, is_url

# By these files other programs know that a directory is whole.
_MARKS = ("zarr.json", "config.json")
# The root of a new file system has it.
_NOT_COUNTED = "lost+found"
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def check_directory(flag: str, path: str | os.PathLike) -> None:
    """Raises UserError, naming `flag`, unless `path` is a directory that can be written, or be made. Makes nothing.

    URLs are not checked.
    """
    path = os.fspath(path)
    if is_url(path):
        return
    place = os.path.realpath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))  # a full disk makes files, but empty ones
    except OSError as error:
        raise UserError(f"--{flag} {path} cannot be written ({place}: {error.strerror}): choose another") from None


def check_file(flag: str, path: str | os.PathLike) -> None:
    """Raises UserError, naming `flag`, unless `path` is a file that can be written, or be made. Makes nothing.

    URLs are not checked.
    """
    path = os.fspath(path)
    if is_url(path):
        return
    if os.path.isdir(path):
        raise UserError(f"--{flag} {path} is a directory, but it takes a file")
    if not os.path.exists(path):
        check_directory(flag, os.path.dirname(os.path.realpath(path)))
    elif not os.access(path, os.W_OK):
        raise UserError(f"--{flag} {path} cannot be written: choose another")


def is_of_the_disk(error: OSError) -> bool:
    """Whether an error says that a disk is full, or takes no writes."""
    return error.errno in _OF_THE_DISK


def check_free(output: str | os.PathLike) -> None:
    """Raises UserError unless nothing is at `output`, or an empty directory."""
    if not is_free(output):
        raise UserError(f"output {os.fspath(output)} already exists and is not empty: remove it or choose another")


def is_free(output: str | os.PathLike) -> bool:
    """Whether nothing is at `output`, or an empty directory."""
    output = epath.Path(output)
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
def new_directory(output: str | os.PathLike) -> Iterator[Path | epath.Path]:
    """Gives a new directory that is `output` when the `with` block ends, and is removed if an exception ends it.

    An empty directory that is at `output` is filled, as it may be a link or a mount point; so is one that a link only
    names. Raises UserError where it cannot be written, or `output` is not free at the end.

    In a bucket, where nothing can be renamed, it is `output` from the beginning, and nothing is removed.
    """
    if in_bucket(output):
        with writing(output):
            yield epath.Path(output)
        return
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


def _contents(directory: Path | epath.Path) -> list[Path | epath.Path]:
    """What is in a directory."""
    return [path for path in directory.iterdir() if path.name != _NOT_COUNTED]
