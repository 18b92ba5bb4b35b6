"""What commands write is there whole or not at all, through links and on mount points too."""

import os

import pytest

from tests.file_systems import mounted
from ttt_e2e.errors import UserError
from ttt_e2e.outputs import is_free, new_directory


def write(output):
    """Makes a directory of two files and a directory, the last of which says that it is whole."""
    with new_directory(output) as directory:
        (directory / "c").mkdir()
        (directory / "c/0").write_text("data")
        (directory / "zarr.json").write_text("{}")
        (directory / "zz").write_text("")


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


def directly(target):
    return target


def into_an_empty_directory(target):
    target.mkdir()
    return target


def by_a_link_to_an_empty_directory(target):
    target.mkdir()
    return by_a_dangling_link(target)


def by_a_dangling_link(target):
    link = target.with_name("link")
    link.symlink_to(target.name)
    return link


def from_within(target):
    target.mkdir()
    os.chdir(target)
    return "."


WAYS = (directly, into_an_empty_directory, by_a_link_to_an_empty_directory, by_a_dangling_link, from_within)


@pytest.mark.parametrize("way", WAYS)
def test_a_directory_is_made(way, target, monkeypatch):
    monkeypatch.chdir(target.parent)
    output = way(target)
    assert is_free(output)
    write(output)
    assert names(target) == ["c", "zarr.json", "zz"]
    assert not is_free(output)
    assert {"target"} <= set(names(target.parent)) <= {"link", "target"}


@pytest.mark.parametrize("way", WAYS)
def test_what_fails_leaves_nothing(way, target, monkeypatch):
    monkeypatch.chdir(target.parent)
    output = way(target)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"), new_directory(output) as new:
        (new / "file").write_text("half")
        raise OSError(28, "No space left on device")
    assert is_free(output)
    assert not (target.exists() and names(target))
    assert set(names(target.parent)) <= {"link", "target"}


def test_a_mount_point_is_filled(target):
    with mounted(target, "100k"):
        (target / "lost+found").mkdir()  # as in a file system that was just made
        assert is_free(target)
        write(target)
        assert names(target) == ["c", "lost+found", "zarr.json", "zz"]


def test_a_file_system_that_fills_up_is_left_as_it_was(target):
    with mounted(target, "100k"):
        with pytest.raises(UserError, match="No space left on device"), new_directory(target) as new:
            (new / "file").write_bytes(bytes(200_000))
        assert names(target) == []


def test_what_was_made_meanwhile_is_left_alone(target):
    for is_there in (False, True):
        if is_there:
            (target / "precious").unlink()
        with pytest.raises(UserError, match=r"target.*(not empty|has made precious)"), new_directory(target) as new:
            (new / "file").write_text("")
            target.mkdir(exist_ok=True)
            (target / "precious").write_text("")
        assert names(target) == ["precious"] and names(target.parent) == ["target"]
