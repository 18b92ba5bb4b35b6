"""Small file systems to fill, to mount read-only, or to be mount points; where the machine lets a test mount any."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(directory: Path, size: str) -> Iterator[Path]:
    """Mounts a tmpfs of `size` ("400k") on a directory, made if needed. Skips the test where that is not allowed."""
    directory.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)  # a failing test may leave files open


def make_read_only(directory: Path) -> None:
    """Mounts the tmpfs on a directory anew, read-only."""
    subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
