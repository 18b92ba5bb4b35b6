"""Parts and the stores that are merged of them; documents held out by their texts, or given apart."""

import json
import logging
import shutil

import numpy as np
import pytest

from ttt_e2e.data.prepare import merge, prepare
from ttt_e2e.data.store import TokenStore
from ttt_e2e.data.tokenizers import load_tokenizer
from ttt_e2e.errors import UserError

SPLITS = ("train", "val")


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(9):
        records = [{"text": f"line {j} of file {i}, é, " * (j + 1)} for j in range(4)]
        (root / f"{i}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "picture.png").write_bytes(b"")
    return root


def run(corpus, output, tokenizer="bytes", **arguments):
    return prepare(str(corpus), str(tokenizer), output, progress=False, **dict(num_workers=0) | arguments)


def tokens_of(path, split):
    store = TokenStore.open(path, split)
    return store.stretch(0, store.num_tokens)


def texts_of(path, split):
    tokens, bos_id = tokens_of(path, split), TokenStore.open(path, split).attributes["bos_id"]
    tokenizer = load_tokenizer(TokenStore.open(path, split).tokenizer_spec)
    return [tokenizer.decode(part[1:]) for part in np.split(tokens, np.flatnonzero(tokens == bos_id)[1:])]


@pytest.fixture
def parts(corpus, tmp_path):
    for i in range(4):
        run(corpus, tmp_path / f"parts/{i}", part=f"{i}/4", val_fraction=0.3)
    return [tmp_path / f"parts/{i}" for i in range(4)]


def test_merged_parts_are_the_whole(corpus, parts, tmp_path):
    whole = run(corpus, tmp_path / "whole", val_fraction=0.3)
    merged = merge(parts[::-1], tmp_path / "merged")
    for name in ("num_documents", "num_tokens", "vocab_size", "bos_id", "tokenizer", "left_out"):
        assert merged[name] == whole[name]
    assert {**merged["prepared_from"]} == whole["prepared_from"]
    for split in SPLITS:
        np.testing.assert_array_equal(tokens_of(tmp_path / "merged", split), tokens_of(tmp_path / "whole", split))
        ours, theirs = (TokenStore.open(tmp_path / name, split) for name in ("merged", "whole"))
        count = theirs.num_sequences(16)
        np.testing.assert_array_equal(ours.sequences(range(count), 16, 257), theirs.sequences(range(count), 16, 257))
    # It refers to its parts, and has no tokens of its own.
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["zarr.json"]
    assert merge(parts, tmp_path / "merged") == merged | {"already_prepared": True}
    assert run(corpus, tmp_path / "merged", val_fraction=0.3)["already_prepared"]


def test_parts_know_their_own_files(corpus, parts, tmp_path, monkeypatch):
    """A part is prepared again where one of its files was edited, and the whole where any was."""
    monkeypatch.chdir(tmp_path)
    merge(parts, tmp_path / "merged")
    file = corpus / "0.jsonl"
    contents = file.read_bytes()
    file.write_bytes(contents.replace(b"line", b"lone", 1))
    assert len(contents) == file.stat().st_size and contents != file.read_bytes()

    def is_known(output, **arguments) -> bool:
        try:
            return run("corpus/", output, val_fraction=0.3, **arguments)["already_prepared"]
        except UserError as error:
            assert "a file of its input has changed" in str(error)
            return False

    assert [is_known(parts[i], part=f"{i}/4") for i in range(4)] == [False, True, True, True]
    assert not is_known(tmp_path / "merged")
    # Parts whose input was written in another way are parts of the same corpus.
    file.write_bytes(contents)
    shutil.rmtree(parts[3])
    run("./corpus", parts[3], part="3/4", val_fraction=0.3)
    assert merge(parts, tmp_path / "again")["num_tokens"] == merge(parts, tmp_path / "merged")["num_tokens"]


def test_a_merged_store_moves_with_its_parts(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    merge(["parts/0", "parts/1", "parts/2", "parts/3"], "parts/merged")
    before = TokenStore.open("parts/merged", "train")
    shutil.move("parts", "elsewhere")
    after = TokenStore.open(tmp_path / "elsewhere/merged", "train")
    assert after.fingerprint == before.fingerprint
    assert len(after.stretch(0, after.num_tokens)) == before.num_tokens


def test_parts_with_a_trained_tokenizer(corpus, tmp_path):
    run(corpus, tmp_path / "whole", "train:290")
    model = tmp_path / "whole/tokenizer.model"
    parts = [tmp_path / f"{i}" for i in range(2)]
    for i, part in enumerate(parts):
        run(corpus, part, model, part=f"{i}/2")
    merge(parts, tmp_path / "merged")
    assert (tmp_path / "merged/tokenizer.model").read_bytes() == model.read_bytes()
    assert texts_of(tmp_path / "merged", "train") == texts_of(tmp_path / "whole", "train")
    with pytest.raises(UserError, match="'train:300': parts take one that is there already"):
        run(corpus, tmp_path / "other", "train:300", part="0/2")


@pytest.mark.parametrize("part", ["4/4", "1", "a/b", "-1/4", "1/0", "1/4/2"])
def test_bad_part(part, corpus, tmp_path):
    with pytest.raises(UserError, match=f"part '{part}': legal: I/N with I from 0 to N - 1"):
        run(corpus, tmp_path / "x", part=part)


def test_more_parts_than_files(corpus, tmp_path):
    with pytest.raises(UserError, match="part 0/10: parts have whole files, and the input has 9"):
        run(corpus, tmp_path / "x" / "y", part="0/10")
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())


def test_merge_refuses(corpus, parts, tmp_path):
    def refusal(*stores):
        with pytest.raises(UserError) as caught:
            merge(stores, tmp_path / "merged")
        assert not (tmp_path / "merged").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    assert "part 2/4 is missing; legal: all 4 parts" in refusal(parts[0], parts[1], parts[3])
    assert "part 1/4, as " in refusal(*parts, parts[1])
    run(corpus, tmp_path / "whole")
    assert "whole: no part of a corpus" in refusal(*parts, tmp_path / "whole")
    assert "absent: no token store there" in refusal(*parts, tmp_path / "absent")
    assert "gs://b/x: legal: local directories" in refusal("gs://b/x", *parts)
    run(corpus, tmp_path / "other", part="3/4", val_fraction=0.3, min_tokens=3)
    assert "other: min_tokens 3, but " in refusal(*parts[:3], tmp_path / "other")
    run(corpus, tmp_path / "third", part="2/3", val_fraction=0.3)
    assert "third: number of parts 3, but" in refusal(*parts[:2], tmp_path / "third")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/precious").write_text("mine")
    with pytest.raises(UserError, match=r"merged: exists already; delete it"):
        merge(parts, tmp_path / "merged")


def test_a_part_that_is_gone_or_another(corpus, parts, tmp_path):
    merge(parts, tmp_path / "merged")
    shutil.move(parts[1], tmp_path / "gone")
    with pytest.raises(UserError, match="parts/1: no token store there"):
        TokenStore.open(tmp_path / "merged", "train")
    run(corpus, parts[1], part="1/4", val_fraction=0.1)
    with pytest.raises(UserError, match=r"parts/1: is not the part 1 that .*merged was merged from; merge the store"):
        TokenStore.open(tmp_path / "merged", "train")
    with pytest.raises(UserError, match=r"merged: no split 'test'; it has train, val"):
        TokenStore.open(tmp_path / "merged", "test")


def test_damage_in_and_of_parts(parts, tmp_path):
    merged = tmp_path / "merged"
    merge(parts, merged)
    (parts[2] / "train/c/0").write_bytes(b"garbage")
    store = TokenStore.open(merged, "train")
    assert len(store.stretch(0, 100)) == 100
    with pytest.raises(UserError, match=r"merged/train: damaged data \(.*parts/2/train/c/0.*"):
        store.stretch(0, store.num_tokens)
    group = json.loads((merged / "zarr.json").read_text())
    for damaged in ([1], [{}], [{"path": 1, "num_tokens": {}, "digest": {}}], [{"path": "../0", "num_tokens": 1}]):
        group["attributes"]["parts"] = damaged
        (merged / "zarr.json").write_text(json.dumps(group))
        with pytest.raises(UserError, match=r"merged/zarr.json: damaged metadata \(parts\)"):
            TokenStore.open(merged, "train")


def test_copies_of_a_document_are_in_one_split(corpus, tmp_path):
    """Also copies under other names, in other files. Names alone would put some on both sides."""
    for path in list(corpus.glob("*.jsonl")):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    run(corpus, tmp_path / "store", val_fraction=0.4)
    train, val = (texts_of(tmp_path / "store", split) for split in SPLITS)
    assert len(train) + len(val) == 72 and not set(train) & set(val)
    assert len(val) == 2 * len(set(val)) == 28


def test_held_out_input(corpus, tmp_path, caplog):
    held_out = tmp_path / "held.jsonl"
    shutil.copy(corpus / "3.jsonl", held_out)
    with held_out.open("a") as file:
        file.write('{"text": "one more"}\n')
    caplog.set_level(logging.INFO)
    summary = run(corpus, tmp_path / "store", val_input=str(held_out))
    train, val = (texts_of(tmp_path / "store", split) for split in SPLITS)
    assert len(train) == 32 and len(val) == 5 and val[-1] == "one more" and not set(train) & set(val)
    assert summary["left_out"]["copies_of_val"] == 4 and summary["left_out"]["files"] == {".png": 1}
    assert "left out: 1 file of .png; 4 documents that the held-out input has too" in caplog.text
    with pytest.raises(UserError, match="exists already, made with other settings"):
        run(corpus, tmp_path / "store")
    for i in range(2):
        run(corpus, tmp_path / f"{i}", val_input=str(held_out), part=f"{i}/2")


def test_bad_records_and_short_documents_are_said(corpus, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with (corpus / "5.jsonl").open("a") as file:
        file.write('{"txt": 1}\n{"text": ""}\n{\n')
    with pytest.raises(UserError, match=r'5.jsonl:5: no string "text" \(it has txt\)'):
        run(corpus, tmp_path / "store")
    assert not (tmp_path / "store").exists() and not list(tmp_path.glob(".*"))
    left_out = run(corpus, tmp_path / "store", on_bad_record="skip")["left_out"]
    assert left_out["bad_records"] == 2 and left_out["short_documents"] == 1
    assert "5.jsonl:5: no string" in left_out["first_bad_record"]
    assert "2 bad records, the first " in caplog.text and "1 documents that are empty or too short" in caplog.text
    with pytest.raises(UserError, match="on_bad_record 'ignore': legal: fail or skip"):
        run(corpus, tmp_path / "other", on_bad_record="ignore")


def test_a_store_of_an_older_version_stays(corpus, tmp_path):
    run(corpus, tmp_path / "store")
    file = tmp_path / "store/zarr.json"
    group = json.loads(file.read_text())
    settings = group["attributes"]["prepared_from"]
    for name in ("val_input", "text_field", "on_bad_record", "part"):
        del settings[name]
    settings["version"] = 1
    file.write_text(json.dumps(group))
    assert run(corpus, tmp_path / "store")["already_prepared"]
    with pytest.raises(UserError, match="text_field 'text', not 'body'"):
        run(corpus, tmp_path / "store", text_field="body")
