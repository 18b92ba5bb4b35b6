"""Files are written whole or not at all."""

import pytest
from etils import epath

from ttt_e2e.errors import UserError
from ttt_e2e.runs.files import replace_bytes, replace_text


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    replace_bytes(path, b"\x00\xff")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("file", b"\x00\xff")]

    def fail(self, contents):
        with self.open("wb") as file:
            file.write(contents[:1])
        raise OSError("no space left")

    monkeypatch.setattr(type(epath.Path(path)), "write_bytes", fail)
    with pytest.raises(UserError, match=r"file cannot be written \(no space left\)"):
        replace_text(path, "new")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("file", b"\x00\xff")]
