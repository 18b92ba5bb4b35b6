import gzip
import itertools
import json
import os

import pytest

from ttt_e2e.data.documents import counted, find_documents, standard_library
from ttt_e2e.data.readers import Document
from ttt_e2e.errors import UserError


def json_lines(*texts):
    return "".join(json.dumps({"text": text, "id": 7}) + "\n" for text in texts)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    put(root / "b.txt", "b\r\nb")
    put(root / "a.md", "\ufeff# a")
    put(root / "deep/c.txt.gz", "c")
    put(root / "deep/d.jsonl", json_lines("d1", "d2\n") + "\n" + json_lines("é"))
    put(root / "deep/e.jsonl.gz", json_lines("e"))
    put(root / "picture.png", b"\xff")
    return root


def test_standard_library():
    documents = list(standard_library())
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert sum(len(document.text) for document in documents) > 5e6
    assert list(find_documents("stdlib")) == documents


def test_directory(corpus):
    assert list(find_documents(corpus)) == [
        Document("a.md", "# a"),
        Document("b.txt", "b\r\nb"),
        Document("deep/c.txt.gz", "c"),
        Document("deep/d.jsonl:1", "d1"),
        Document("deep/d.jsonl:2", "d2\n"),
        Document("deep/d.jsonl:4", "é"),
        Document("deep/e.jsonl.gz:1", "e"),
    ]


def test_file_and_glob(corpus, monkeypatch):
    assert list(find_documents(corpus / "b.txt")) == [Document("b.txt", "b\r\nb")]
    assert [d.name for d in find_documents(f"{corpus}/deep/*.jsonl*")] == [f"d.jsonl:{i}" for i in (1, 2, 4)] + [
        "e.jsonl.gz:1"
    ]
    recursive = [d.name for d in find_documents(f"{corpus}/**/*.txt*")]
    assert recursive == ["b.txt", "deep/c.txt.gz"]
    monkeypatch.chdir(corpus)
    assert [d.name for d in find_documents("**/*.txt*")] == recursive
    put(corpus / "odd[1].txt", "odd")
    assert list(find_documents("odd[1].txt")) == [Document("odd[1].txt", "odd")]


def test_python_source_keeps_its_line_ends_and_encoding(tmp_path):
    put(tmp_path / "x.py", "# -*- coding: latin-1 -*-\r\nx = 'é'\r\n".encode("latin-1"))
    assert next(iter(find_documents(tmp_path))).text.endswith("x = 'é'\r\n")


def test_json_lines_are_read_lazily(tmp_path):
    put(tmp_path / "x.jsonl", json_lines(*map(str, range(1000))) + "broken")
    first = list(itertools.islice(find_documents(tmp_path), 5))
    assert [document.text for document in first] == ["0", "1", "2", "3", "4"]


def test_nothing_found(tmp_path):
    (tmp_path / "empty").mkdir()
    for spec in (tmp_path / "absent", tmp_path / "empty", tmp_path / "*.txt"):
        with pytest.raises(UserError, match=r"no document found; legal: 'stdlib', or .*\.txt \.md"):
            find_documents(spec)


@pytest.fixture
def with_irregular(corpus):
    """Broken links, links to one another, and a pipe that nobody writes to."""
    (corpus / "dangling.txt").symlink_to("absent.txt")
    (corpus / "loop.txt").symlink_to("pool.txt")
    (corpus / "pool.txt").symlink_to("loop.txt")
    os.mkfifo(corpus / "pipe.txt")
    return corpus


@pytest.mark.parametrize("spec", ["{}", "{}/**/*.txt*"])
def test_what_is_no_file_is_left_out_and_counted(spec, with_irregular):
    found = find_documents(spec.format(with_irregular))
    assert {"b.txt", "deep/c.txt.gz"} <= {document.name for document in found}
    numbers = {name: number for name, number in found.left_out.items() if name != ".png"}
    assert numbers == {"broken link": 3, "pipe, socket or device": 1}
    assert "3 x broken link, 1 x pipe, socket or device" in counted(found.left_out)
    assert sum(found.sizes()) > 0


@pytest.mark.parametrize(
    ("name", "what"), [("dangling.txt", "broken link"), ("loop.txt", "broken link"), ("pipe.txt", "pipe")]
)
def test_what_is_no_file_is_refused_by_name(name, what, with_irregular):
    with pytest.raises(UserError, match=rf"{name}': is a {what}.*; legal: 'stdlib'"):
        find_documents(with_irregular / name)


@pytest.fixture
def with_links(tmp_path):
    """Links to a file and to directories, one to where it is itself; hidden files and directories; upper case."""
    root = tmp_path / "links"
    put(root / "BOOK.TXT", "book")
    put(root / "deep/Lines.JSONL.gz", json_lines("line"))
    put(root / ".hidden.txt", "hidden")
    put(root / ".git/config.txt", "hidden")
    put(tmp_path / "elsewhere/x.md", "x")
    put(tmp_path / "file.txt", "file")
    (root / "link.txt").symlink_to(tmp_path / "file.txt")
    (root / "away").symlink_to(tmp_path / "elsewhere")
    (root / "deep/again").symlink_to(root)
    (root / "deep/away").symlink_to(tmp_path / "elsewhere")
    return root


@pytest.mark.parametrize("spec", ["{}", "{}/**/*", "{}/**"])
def test_directories_and_globs_find_the_same(spec, with_links):
    found = find_documents(spec.format(with_links))
    names = ["BOOK.TXT", "away/x.md", "deep/Lines.JSONL.gz", "link.txt"]
    assert [name for _, name in found.files] == names and found.left_out == {"hidden": 2}
    assert [document.text for document in found] == ["book", "x", "line", "file"]


def test_a_file_that_two_links_name_is_read_once(with_links):
    (with_links / "other.txt").symlink_to("link.txt")
    assert [name for _, name in find_documents([with_links / "link.txt", with_links / "other.txt"]).files] == [
        "link.txt"
    ]


def test_what_a_pattern_names_is_found(with_links):
    def names(pattern):
        return [name for _, name in find_documents(f"{with_links}/{pattern}").files]

    assert names("*.txt") == ["link.txt"] and names("**/*.md") == ["away/x.md"]
    assert names("**/deep/*.gz") == names("d*/**/L*") == ["deep/Lines.JSONL.gz"]
    assert names("deep/**/L*") == ["Lines.JSONL.gz"]
    assert names(".hid*") == [".hidden.txt"] and names(".git/**/*.txt") == ["config.txt"]
    with pytest.raises(UserError, match="no document found"):
        names("**/deep/*.md")


def test_a_file_that_is_gone_is_named(corpus):
    found = find_documents(corpus)
    (corpus / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b.txt: cannot be read \(No such file"):
        found.sizes()


def test_a_directory_that_cannot_be_read_is_named(corpus, monkeypatch):
    scan = os.scandir

    def scandir(path):
        if os.path.basename(path) == "deep":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"deep: cannot be read \(Permission denied\)"):
        find_documents(corpus)


def test_unsupported_suffix(corpus):
    for spec in (corpus / "picture.png", f"{corpus}/*"):
        with pytest.raises(UserError, match=r"picture.png: unsupported suffix '.png'; legal: .*\.txt"):
            find_documents(spec)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"ok\nok\nbad \xff", r"x.txt:3: byte 0xff is not valid utf-8"),
        ("x.md", b"\xc3", r"x.md:1: byte 0xc3"),
        ("x.py", b"# coding: nonsense\n", r"x.py: unknown encoding"),
        ("x.jsonl", json_lines("ok") + '{"text": ', r"x.jsonl:2: not a line of JSON"),
        ("x.jsonl", b'{"text": "\xff"}', r"x.jsonl:1: not a line of JSON in UTF-8"),
        ("x.jsonl", json_lines("ok", "ok") + '{"txt": "x"}', r'x.jsonl:3: no string "text"'),
        ("x.jsonl", '{"text": 5}', r'x.jsonl:1: no string "text"'),
        ("x.jsonl", '["text"]', r'x.jsonl:1: no string "text"'),
        ("x.jsonl", '{"text": "\\ud800"}', r"x.jsonl:1: .*surrogate"),
        ("x.jsonl.gz", json_lines("ok") + "{", r"x.jsonl.gz:2: not a line of JSON"),
    ],
)
def test_bad_content(name, content, message, tmp_path):
    put(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        list(find_documents(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz"])
def test_damaged_gzip(damage, name, tmp_path):
    whole = bytearray(gzip.compress(json_lines(*map(str, range(100))).encode()))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x55
    (tmp_path / name).write_bytes({"cut": whole[:-12], "flipped": flipped, "plain": b"plain text"}[damage])
    with pytest.raises(UserError, match=name):
        list(find_documents(tmp_path))
