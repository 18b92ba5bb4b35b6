"""Directories that commands read and write: on this machine, or in a bucket of Google Cloud Storage (gs://)."""

import contextlib
import logging
import os

from etils import epath

from ttt_e2e.errors import UserError, first_line

BUCKET = "gs://"


def is_url(path) -> bool:
    """Whether a path is an address of another kind of storage than this machine's disks."""
    return "://" in os.fspath(path)


def in_bucket(path) -> bool:
    """Whether a path is in a bucket, where objects are written whole: they can be neither appended to nor renamed."""
    return os.fspath(path).startswith(BUCKET)


def absolute(path) -> epath.Path:
    """The path as it is from any working directory; one in a bucket stays what it is."""
    path = epath.Path(path)
    return path if in_bucket(path) else path.resolve()


def check(name: str, path: str) -> None:
    """Checks that a directory or file, if it is in a bucket, can be reached; of others, looks at the name only.

    name: the flag or field that has it, for messages.

    Raises:
      UserError: it is the address of another kind of storage, the extra is not installed, or there is no such bucket.
    """
    if not is_url(path):
        return
    if not in_bucket(path):
        raise UserError(f"{name} is {path!r}, but it must be a path of this machine, or gs://BUCKET/PATH")
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError:
        raise UserError(f"{name} is {path!r}, which needs the extra: pip install 'ttt-e2e[gcs]'") from None
    # TensorStore writes beside gcsfs, whose listings of directories would be out of date.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    for logger in ("gcsfs", "asyncio"):  # they print tracebacks of what is said below in a line
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        with contextlib.suppress(FileNotFoundError):
            next(iter(epath.Path(path).iterdir()), None)
            return
        bucket = f"{BUCKET}{path.removeprefix(BUCKET).split('/')[0]}"
        next(iter(epath.Path(bucket).iterdir()), None)
    except Exception as error:  # of the network, of credentials, ...: whatever a client's libraries raise
        raise UserError(f"{name} is {path!r}, which cannot be reached ({first_line(error)})") from None


def check_local(name: str, path: str) -> None:
    """Raises `UserError` where a path is not one of this machine."""
    if is_url(path):
        raise UserError(f"{name} is {path!r}, but it must be a path of this machine")
