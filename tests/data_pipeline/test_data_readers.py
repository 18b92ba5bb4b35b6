"""Compressed and columnar files, nested fields, several inputs and bad records."""

import json

import pytest

from ttt_e2e.data import readers
from ttt_e2e.data.documents import Skipped, find_documents
from ttt_e2e.data.prepare import prepare
from ttt_e2e.errors import UserError

TEXTS = [f"text {i}, é\n" * (i % 7) for i in range(400)]


def lines(texts):
    return "".join(json.dumps({"id": i, "meta": {"text": text}}) + "\n" for i, text in enumerate(texts)).encode()


def write_zst(path, data, frames=3):
    zstandard = pytest.importorskip("zstandard")
    step = len(data) // frames + 1
    path.write_bytes(b"".join(zstandard.compress(data[at : at + step]) for at in range(0, len(data), step)))
    return path


def write_parquet(path, texts, rows=150, **options):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"id": range(len(texts)), "text": texts, "meta": [{"text": text, "n": 1} for text in texts]})
    parquet.write_table(table, path, row_group_size=rows, **options)
    return path


def texts_of(*inputs, **options):
    return [document.text for document in find_documents(list(map(str, inputs)), **options)]


def refusal(*inputs, **options):
    with pytest.raises(UserError) as caught:
        texts_of(*inputs, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("read_bytes", [7, 100, 1 << 18])
def test_zstd_of_several_frames(read_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_READ_BYTES", read_bytes)
    path = write_zst(tmp_path / "x.jsonl.zst", lines(TEXTS))
    documents = list(find_documents(path, text_field="meta.text"))
    assert [document.text for document in documents] == TEXTS
    assert documents[3].name == "x.jsonl.zst:4"
    assert texts_of(write_zst(tmp_path / "y.txt.zst", "é\r\n".encode(), frames=1)) == ["é\r\n"]
    (tmp_path / "empty.jsonl.zst").write_bytes(b"")
    assert texts_of(tmp_path / "empty.jsonl.zst") == []


def test_zstd_cut_short_or_damaged(tmp_path):
    """A file cut anywhere but between frames is refused: the library by itself takes its end for that of the data."""
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(lines(TEXTS[:200])), zstandard.compress(lines(TEXTS[200:]))]
    whole, path = b"".join(frames), tmp_path / "x.jsonl.zst"
    for size in (1, 3, len(frames[0]) - 1, len(frames[0]) + 1, len(frames[0]) + 20, len(whole) - 5, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert f"{path}: damaged zstd file" in refusal(path, text_field="meta.text")
    for damaged in (b"plain text", whole + b"more", whole[:-9] + b"x" * 9):
        path.write_bytes(damaged)
        assert f"{path}: damaged zstd file" in refusal(path, text_field="meta.text")
    path.write_bytes(frames[0])
    assert texts_of(path, text_field="meta.text") == TEXTS[:200]


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "use_dictionary": False}])
@pytest.mark.parametrize("text_field", ["text", "meta.text"])
def test_parquet(text_field, options, tmp_path):
    path = write_parquet(tmp_path / "x.parquet", TEXTS, **options)
    documents = list(find_documents(path, text_field=text_field))
    assert [document.text for document in documents] == TEXTS
    assert documents[-1].name == "x.parquet:400"


def test_parquet_cut_short_or_damaged(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", TEXTS)
    whole = path.read_bytes()
    for damaged in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:3],
        b"",
        whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :],
    ):
        path.write_bytes(damaged)
        assert f"{path}: damaged Parquet file, or cannot be read (" in refusal(path)


def test_parquet_is_read_by_groups_of_rows(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    path, groups = write_parquet(tmp_path / "x.parquet", TEXTS), []
    original = parquet.ParquetFile.iter_batches

    def iter_batches(self, *arguments, row_groups, **options):
        groups.append(row_groups)
        return original(self, *arguments, row_groups=row_groups, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", iter_batches)
    documents = iter(find_documents(path))
    for _ in range(150):
        next(documents)
    assert groups == [[0]]


def test_wrong_fields(tmp_path):
    table = write_parquet(tmp_path / "x.parquet", TEXTS)
    assert 'no column "body"; it has id, text, meta: choose one by --text_field' in refusal(table, text_field="body")
    assert 'no column "meta.body"' in refusal(table, text_field="meta.body")
    assert 'no column "text.body"' in refusal(table, text_field="text.body")
    assert 'column "id" is of int64; legal: text' in refusal(table, text_field="id")
    assert 'column "meta" is of struct' in refusal(table, text_field="meta")
    records = tmp_path / "x.jsonl"
    records.write_bytes(lines(TEXTS))
    assert 'x.jsonl:1: no string "text" (it has id, meta); legal: ' in refusal(records)
    assert 'x.jsonl:1: no string "id.text"' in refusal(records, text_field="id.text")
    records.write_text("[" * 100_000)
    assert "x.jsonl:1: not a line of JSON" in refusal(records)


def test_bad_records_are_counted_and_the_first_is_named(tmp_path):
    records = tmp_path / "x.jsonl"
    records.write_bytes(b'{"text": "one"}\n{"text": \n\n{"body": 1}\n{"text": "\\ud800"}\n\xff\n{"text": "two"}\n')
    (tmp_path / "y.txt").write_bytes(b"\xff")
    table = write_parquet(tmp_path / "z.parquet", ["three", None, "four"])
    assert "x.jsonl:2: not a line of JSON" in refusal(tmp_path)
    assert 'z.parquet:2: "text" is null' in refusal(table)
    skipped = Skipped()
    found = find_documents(tmp_path, skips_bad_records=True).documents(skipped)
    assert [document.text for document in found] == ["one", "two", "three", "four"]
    assert skipped.count == 6 and "x.jsonl:2: not a line of JSON" in skipped.first
    table.write_bytes(table.read_bytes()[:-1])
    assert "damaged Parquet file" in refusal(table, skips_bad_records=True)  # a damaged file is no bad record


def test_several_inputs(tmp_path):
    for name in ("a/1.txt", "a/2.txt", "b/1.txt", "c,d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    a, b = tmp_path / "a", tmp_path / "b"
    assert texts_of(a, b) == texts_of(f"{a},{b}") == ["a/1.txt", "a/2.txt", "b/1.txt"]
    assert texts_of(b, a) == ["b/1.txt", "a/1.txt", "a/2.txt"]
    assert texts_of(a / "2.txt", a, f"{a}/*") == ["a/2.txt", "a/1.txt"]  # each file once
    assert texts_of(tmp_path / "c,d.txt") == ["c,d.txt"]
    assert "absent': no document found" in refusal(a, tmp_path / "absent")


def test_files_that_are_left_out_are_counted_by_suffix(tmp_path):
    for name in ("a.txt", "b.png", "c.png", "d.csv.gz", "e", "f.parquet.gz"):
        (tmp_path / name).write_text("text")
    assert find_documents(tmp_path).left_out == {"no suffix": 1, ".csv.gz": 1, ".parquet.gz": 1, ".png": 2}
    (tmp_path / "a.txt").unlink()
    assert "no document found (but 2 files of .png, 1 file of .csv.gz" in refusal(tmp_path)


@pytest.mark.parametrize(("name", "library"), [("x.txt.zst", "zstandard"), ("x.parquet", "pyarrow")])
def test_missing_library(name, library, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, library, None)
    assert f"{name}: reading it takes {library}: pip install 'ttt-e2e[corpora]'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cut.jsonl.zst", "cut.jsonl.zst: damaged zstd file"),
        ("cut.parquet", "cut.parquet: damaged Parquet file"),
        ("field.parquet", 'field.parquet: no column "meta.body"'),
        ("field.jsonl", 'field.jsonl:2000: no string "meta.body"'),
    ],
)
def test_what_cannot_be_read_leaves_nothing_half_written(name, reason, tmp_path):
    """Also where it comes late: after more documents than are read to choose the held-out ones."""
    good = [{"meta": {"body": f"text {i}"}} for i in range(2000)]
    data = "".join(json.dumps(record) + "\n" for record in good).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    path = tmp_path / name
    if name == "cut.jsonl.zst":
        path.write_bytes(pytest.importorskip("zstandard").compress(data)[:-3])
    elif name == "field.jsonl":
        path.write_bytes(data[: data.rindex(b'{"meta"')] + b'{"meta": 5}\n')
    else:
        write_parquet(path, TEXTS)
        path.write_bytes(path.read_bytes()[: -8 if name == "cut.parquet" else None])
    with pytest.raises(UserError) as caught:
        inputs = [str(tmp_path / "a.jsonl"), str(path)]
        prepare(inputs, "bytes", tmp_path / "out/store", text_field="meta.body", progress=False)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())
