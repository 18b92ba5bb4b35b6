"""JSON that is nested too deep to be read is bad input: one line, wherever it is read."""

import ast
import json
import time
from pathlib import Path

import pytest

from ttt_e2e.data.documents import find_documents
from ttt_e2e.data.store import TokenStore, read_attributes
from ttt_e2e.data.tokenizer_json import _config_beside
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.records import Records
from ttt_e2e.flags import load_config_file
from ttt_e2e.inference.prompts import read_prompts
from ttt_e2e.runs.directory import first_start, load_config
from ttt_e2e.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
DEEP = "[" * 200_000 + "]" * 200_000


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


READERS = {
    "corpus": lambda path: list(find_documents(put(path / "x.jsonl", f'{{"text": {DEEP}}}\n'))),
    "prompts": lambda path: read_prompts(str(put(path / "x.jsonl", f'{{"prompt": {DEEP}}}\n'))),
    "config": lambda path: load_config_file(str(put(path / "config.json", DEEP))),
    "run": lambda path: load_config(put(path / "config.json", DEEP).parent),
    "metrics": lambda path: read_metrics(put(path / "metrics.jsonl", f"{DEEP}\n")),
    "tokenizer's config": lambda path: _config_beside(put(path / "tokenizer_config.json", DEEP)),
    "token store": lambda path: read_attributes(put(path / "zarr.json", f'{{"attributes": {DEEP}}}').parent),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_nested_too_deep_is_bad_input(reader, tmp_path):
    with pytest.raises(UserError, match=r"/(x|config|metrics|zarr)\.json|tokenizer_config.json|no string|\.jsonl"):
        READERS[reader](tmp_path)


@pytest.mark.parametrize("depth", (100, 800))
def test_what_is_nested_less_deep_is_too(depth, tmp_path):
    text = '{"model": {"vocab_size": %s}}' % ("[" * depth + "]" * depth)
    for read in (load_config_file, lambda path: load_config(Path(path).parent)):
        with pytest.raises(UserError, match=r"vocab_size|JSON|recursion"):
            read(str(put(tmp_path / "config.json", text)))


def test_records_that_cannot_be_read_are_made_anew(tmp_path):
    put(tmp_path / "needle.jsonl", f'{{"about": {{}}}}\n{{"n": 1}}\n{{"n": {DEEP}}}\n')
    assert list(Records(tmp_path, "needle", {}, key=("n",)).done) == [(1,)]


def test_a_start_that_cannot_be_read_counts_as_not_recorded(tmp_path):
    put(tmp_path / "starts.jsonl", f"{DEEP}\n")
    assert abs(first_start(tmp_path) - time.time()) < 60


def test_metadata_of_a_split(tmp_path):
    put(tmp_path / "zarr.json", json.dumps({"zarr_format": 3, "node_type": "group"}))
    put(tmp_path / "val/zarr.json", DEEP)
    with pytest.raises(UserError, match="val: damaged metadata"):
        TokenStore.open(tmp_path, "val")


def unguarded(source: str) -> list[int]:
    """Lines of the calls of `json.loads` in no `try` that expects all that it raises."""
    tree, guarded = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(_expects_all(handler) for handler in node.handlers):
            guarded |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "json.loads"]
    of_others = [call for call in calls if not ast.unparse(call.args[0]).startswith("json.dumps(")]
    return [call.lineno for call in of_others if id(call) not in guarded]


def _expects_all(handler: ast.ExceptHandler) -> bool:
    expected = ast.unparse(handler.type) if handler.type else ""
    return "JSON_ERRORS" in expected or expected == "Exception"


@pytest.mark.parametrize("folder", ("ttt_e2e", "launch"))
def test_every_reader_of_json_expects_all_that_it_raises(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    found = {path.name: lines for path in paths if (lines := unguarded(path.read_text(encoding="utf-8")))}
    assert not found, f"json.loads without JSON_ERRORS: {found}"


def test_a_reader_that_does_not_would_be_seen():
    assert unguarded("try:\n    json.loads(text)\nexcept ValueError:\n    pass\n") == [2]
    assert unguarded("try:\n    json.loads(text)\nexcept (*JSON_ERRORS, KeyError):\n    pass\n") == []
