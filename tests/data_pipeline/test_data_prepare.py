import gzip
import json
import os
import shutil

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.data import prepare as prepare_module
from ttt_e2e.data import splits
from ttt_e2e.data.documents import find_documents
from ttt_e2e.data.prepare import prepare
from ttt_e2e.data.readers import Document
from ttt_e2e.data.store import TokenStore, write_attributes
from ttt_e2e.data.tokenizers import load_tokenizer
from ttt_e2e.errors import UserError

SPLITS = ("train", "val")


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(12):
        (root / f"{i}.txt").write_text(f"document number {i}, é, " * (i + 1))
    (root / "lines.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": f"line {i} of the file"}) + "\n" for i in range(28)).encode())
    )
    return root


@pytest.fixture
def output(tmp_path):
    return tmp_path / "runs" / "store"


def run(corpus, output, tokenizer="bytes", **arguments):
    return prepare(str(corpus), tokenizer, output, progress=False, **dict(num_workers=0) | arguments)


def documents_in(output, split):
    """The texts of a split; checks that each starts with BOS."""
    store = TokenStore.open(output, split)
    tokens = store.sequences([0], store.num_tokens - 1, store.attributes["vocab_size"])[0]
    tokenizer = load_tokenizer(store.tokenizer_spec)
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    assert starts[0] == 0
    return [tokenizer.decode(part[1:]) for part in np.split(tokens, starts[1:])]


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_every_document_is_in_one_split(tokenizer, corpus, output):
    summary = run(corpus, output, tokenizer)
    found = {split: documents_in(output, split) for split in SPLITS}
    everything = [document.text for document in find_documents(corpus)]
    assert sorted(found["train"] + found["val"]) == sorted(everything)
    for texts in found.values():
        assert texts == [text for text in everything if text in set(texts)]  # the corpus's order
    assert summary["num_documents"] == {split: len(texts) for split, texts in found.items()} == {"train": 38, "val": 2}
    assert summary["num_tokens"] == {split: TokenStore.open(output, split).num_tokens for split in SPLITS}
    assert summary["vocab_size"] == (257 if tokenizer == "bytes" else 300)
    assert summary["already_prepared"] is False
    assert sorted(path.name for path in output.parent.iterdir()) == ["store"]


def test_model_is_copied(corpus, output, tmp_path):
    run(corpus, output, "train:300")
    model = (output / "tokenizer.model").read_bytes()
    (tmp_path / "mine.model").write_bytes(model)
    summary = run(corpus, tmp_path / "second", str(tmp_path / "mine.model"))
    assert (tmp_path / "second/tokenizer.model").read_bytes() == model
    assert summary["tokenizer"] == "tokenizer.model"
    assert documents_in(tmp_path / "second", "val") == documents_in(output, "val")


def test_split_does_not_depend_on_where_the_corpus_lies(corpus, output, tmp_path):
    first = run(corpus, output)
    shutil.copytree(corpus, tmp_path / "elsewhere/deep")
    second = run(tmp_path / "elsewhere/deep", tmp_path / "second")
    third = run(tmp_path / "elsewhere/*/**/*", tmp_path / "third")  # names begin with "deep/" here
    assert first["digest"] == second["digest"] == third["digest"]


def test_held_out_share(monkeypatch):
    class Texts:
        files, spec = (), ""

        def __init__(self, count):
            self.count = count

        def __iter__(self):
            return (Document("name", f"text {i}") for i in range(self.count))

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.integers(2, 60), st.floats(0.001, 0.999))
    def check_small(count, val_fraction):
        rule = splits.held_out_rule(Texts(count), None, 0, val_fraction)
        held_out = sum(rule(f"text {i}") for i in range(count))
        assert 1 <= held_out <= count - 1 and abs(held_out - val_fraction * count) <= 1

    check_small()
    rules = [splits.held_out_rule(Texts(count), None, 0, 0.1) for count in (3000, 10_000)]
    held_out = [rules[0](f"text {i}") for i in range(3000)]
    assert 250 < sum(held_out) < 350
    assert held_out == [rules[1](f"text {i}") for i in range(3000)]  # a larger corpus moves no document


def test_min_tokens(corpus, output):
    run(corpus, output, min_tokens=100)
    texts = documents_in(output, "train") + documents_in(output, "val")
    assert len(texts) == 8 and all(len(text.encode()) >= 100 for text in texts)


def test_second_run_finds_it_prepared(corpus, output, capfd):
    first = run(corpus, output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert run(corpus, output) == first | {"already_prepared": True}
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(UserError, match=r"exists already, made with other settings \(min_tokens 0, not 5\); delete it"):
        run(corpus, output, min_tokens=5)
    with pytest.raises(UserError, match=r"\(tokenizer 'bytes', not 'train:300'\)"):
        run(corpus, output, "train:300")
    (corpus / "new.txt").write_text("more")
    with pytest.raises(UserError, match=r"files_digest"):
        run(corpus, output)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert capfd.readouterr() == ("", "")


def test_the_input_is_known_however_its_path_is_written(corpus, output, tmp_path, monkeypatch):
    """The same files give the same store, down to its fingerprint; an old store's paths are compared."""
    monkeypatch.chdir(tmp_path)
    first = run("corpus", output)
    spellings = ("corpus/", "./corpus", "corpus/../corpus", str(corpus), "corpus,./corpus/")
    for spelling in spellings:
        assert run(spelling, output) == first | {"already_prepared": True}
    for number, spelling in enumerate(spellings[:3]):
        run(spelling, tmp_path / f"store{number}")
        stores = [TokenStore.open(path, "train") for path in (output, tmp_path / f"store{number}")]
        assert stores[0].fingerprint == stores[1].fingerprint
    shutil.copytree(corpus, tmp_path / "copy")
    assert run("copy", output)["already_prepared"]  # by the contents
    with pytest.raises(UserError, match=r"val_input '', not 'corpus/0.txt'|files_digest"):
        run("corpus", output, val_input="corpus/0.txt")
    file = output / "zarr.json"
    group = json.loads(file.read_text())
    del group["attributes"]["prepared_from"]["contents"]
    file.write_text(json.dumps(group))
    for spelling in spellings[:4]:
        assert run(spelling, output)["already_prepared"]
    with pytest.raises(UserError, match=r"\(input 'corpus', not 'copy'\)"):
        run("copy", output)


def test_the_tokenizer_is_known_by_its_contents(corpus, output, tmp_path, monkeypatch):
    run(corpus, tmp_path / "first", "train:300")
    run(corpus, tmp_path / "second", "train:310")
    model, other = (tmp_path / name / "tokenizer.model" for name in ("first", "second"))
    run(corpus, output, str(model))
    monkeypatch.chdir(model.parent)
    assert run(corpus, output, "tokenizer.model")["already_prepared"]
    assert run(corpus, output, "./tokenizer.model")["already_prepared"]
    with pytest.raises(UserError, match="files_digest"):
        run(corpus, output, str(other))
    with pytest.raises(UserError, match=r"tokenizer .*, not 'bytes'"):
        run(corpus, output, "bytes")


@pytest.mark.parametrize("name", ("3.txt", "lines.jsonl.gz", "held.txt"))
def test_an_edited_file_of_equal_length_is_noticed(name, corpus, output, tmp_path):
    held_out = corpus.parent / "held.txt"
    held_out.write_text("held out")
    arguments = {"val_input": str(held_out)}
    run(corpus, output, **arguments)
    assert run(corpus, output, **arguments)["already_prepared"]
    file = held_out if name == "held.txt" else corpus / name
    contents = file.read_bytes()
    file.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    with pytest.raises(UserError, match="exists already, and a file of its input has changed since; delete it"):
        run(corpus, output, **arguments)
    file.write_bytes(contents)
    assert run(corpus, output, **arguments)["already_prepared"]


def test_output_that_is_something_else(corpus, output, tmp_path):
    output.mkdir(parents=True)
    run(corpus, output)  # an empty directory is as good as none
    (tmp_path / "other").mkdir()
    (tmp_path / "other/precious").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("other", "file"):
        with pytest.raises(UserError, match=f"{name}: exists already, and is no token store; delete it, or"):
            run(corpus, tmp_path / name)
    write_attributes(tmp_path / "official", {})
    with pytest.raises(UserError, match="official: exists already"):
        run(corpus, tmp_path / "official")
    with pytest.raises(UserError, match="output gs://bucket/x: legal: a local directory"):
        run(corpus, "gs://bucket/x")


def test_output_by_a_link(corpus, output):
    whole = run(corpus, output)
    output.with_name("empty").mkdir()
    for target in ("empty", "absent"):
        link = output.with_name(f"to-{target}")
        link.symlink_to(target)
        assert run(corpus, link) | {"output": str(output)} == whole
        assert run(corpus, link)["already_prepared"]
        assert documents_in(output.with_name(target), "val") == documents_in(output, "val")


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, UserError])
def test_interrupted_leaves_nothing(error, tokenizer, corpus, output, monkeypatch):
    written = []

    def append(self, tokens):
        if len(written) == 10:
            assert [path.name.startswith(".store.partial") for path in output.parent.iterdir()] == [True]
            raise error("no more")
        written.append(tokens)

    with monkeypatch.context() as patch:
        patch.setattr("ttt_e2e.data.prepare.TokenWriter.append", append)
        with pytest.raises(UserError if error is OSError else error):
            run(corpus, output, tokenizer)
    assert len(written) == 10 and not list(output.parent.iterdir())
    run(corpus, output, tokenizer)


def test_bad_document_in_the_middle_leaves_nothing(corpus, output):
    (corpus / "zz.jsonl").write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(UserError, match=r"zz.jsonl:2: not a line of JSON"):
        run(corpus, output, "train:300")
    assert not output.exists() and not (output.parent.exists() and list(output.parent.iterdir()))


def test_corpus_too_small(tmp_path, output, corpus):
    root = tmp_path / "small"
    root.mkdir()
    for name, text in (("a.txt", "one"), ("empty.txt", "")):
        (root / name).write_text(text)
        with pytest.raises(
            UserError, match=r"small: . files with 1 documents that differ .* legal: two or more documents"
        ):
            run(root, output)
    (root / "b.txt").write_text("two")
    assert run(root, output)["num_documents"] == {"train": 1, "val": 1}
    with pytest.raises(UserError, match=r"with 0 documents that differ and can have 1000000 tokens or more"):
        run(corpus, tmp_path / "other", min_tokens=1_000_000)


def test_filter_that_empties_a_split(tmp_path, output):
    """Two documents have bytes enough to be kept, but not tokens enough."""
    root = tmp_path / "repetitive"
    root.mkdir()
    for name in "abcd":
        (root / f"{name}.txt").write_text(f"the same words again and again {name} " * 20)
    with pytest.raises(UserError, match=r"4 files with 0 documents that differ and have 600 tokens or more"):
        run(root, output, "train:275", min_tokens=600)
    assert not list(output.parent.iterdir())


FEW_TOKENS = "again and again and " * 30  # of more bytes than those of many tokens


@pytest.fixture
def of_many_tokens(tmp_path):
    """Nineteen documents of more than 400 tokens: random letters, and a few of the words of the others."""
    random, root = np.random.default_rng(0), tmp_path / "many"
    root.mkdir()
    for i in range(19):
        (root / f"{i}.txt").write_text("".join(random.choice(list("abcdefghij klmno"), 500)) + FEW_TOKENS[:100])
    return root


def chosen_first(corpus) -> str:
    """A document of few tokens that is held out before all of those in a directory."""
    least = min(splits._hash(path.read_text()) for path in corpus.iterdir())
    return next(text for i in range(10_000) if splits._hash(text := f"{FEW_TOKENS}{i}") < least)


@pytest.mark.parametrize("tokenizer", ["train:300", "{}/tokenizer.model"])
def test_the_held_out_are_chosen_of_those_that_stay(tokenizer, of_many_tokens, output, tmp_path):
    short = chosen_first(of_many_tokens)
    (of_many_tokens / "short.txt").write_text(short)
    run(of_many_tokens, tmp_path / "any", "train:300")
    assert documents_in(tmp_path / "any", "val") == [short]
    summary = run(of_many_tokens, output, tokenizer.format(tmp_path / "any"), min_tokens=200)
    assert summary["num_documents"] == {"train": 18, "val": 1} and summary["left_out"]["short_documents"] == 1


def test_a_trained_tokenizer_has_seen_no_held_out_document(of_many_tokens, output, monkeypatch):
    (of_many_tokens / "short.txt").write_text(chosen_first(of_many_tokens))
    trained_on = []
    train = prepare_module.train_sentencepiece

    def record(texts, *arguments):
        trained_on.append(list(texts))
        train(iter(trained_on[-1]), *arguments)

    monkeypatch.setattr(prepare_module, "train_sentencepiece", record)
    run(of_many_tokens, output, "train:300", min_tokens=200)
    [held_out] = documents_in(output, "val")
    assert [held_out in texts for texts in trained_on] == [True, False]


def test_few_that_stay_of_many_have_a_share_held_out(of_many_tokens, output, tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "_MAX_LISTED", 19)
    for i in range(20):
        (of_many_tokens / f"short-{i}.txt").write_text(f"{FEW_TOKENS}{i}")
    run(of_many_tokens, tmp_path / "any", "train:300")
    model = f"{tmp_path}/any/tokenizer.model"
    summary = run(of_many_tokens, output, model, min_tokens=200, val_fraction=1e-6)
    assert summary["num_documents"] == {"train": 18, "val": 1}


@pytest.mark.parametrize(
    ("which", "tokenizer"), [("val", "train:300"), ("val", "{}/tokenizer.model"), ("train", "{}/tokenizer.model")]
)
def test_an_input_of_short_documents_is_refused_before_it_is_tokenized(
    which, tokenizer, of_many_tokens, output, tmp_path, monkeypatch
):
    run(of_many_tokens, tmp_path / "any", "train:300")
    (tmp_path / "few").mkdir()
    (tmp_path / "few/short.txt").write_text(FEW_TOKENS)
    inputs = {"val": (of_many_tokens, tmp_path / "few"), "train": (tmp_path / "few", of_many_tokens)}[which]
    monkeypatch.setattr(prepare_module, "_write", None)
    with pytest.raises(UserError, match=f"min_tokens 200: leaves no document for the split '{which}'"):
        run(inputs[0], output, tokenizer.format(tmp_path / "any"), val_input=str(inputs[1]), min_tokens=200)
    assert not list(output.parent.iterdir())


@pytest.mark.parametrize("name", ["pipe.model", "pipe.json"])
def test_a_pipe_is_no_tokenizer(name, corpus, output, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}': is no file; legal"):
        run(corpus, output, tmp_path / name)


def test_editors_lock_files_are_left_out(corpus, output):
    (corpus / "#lock.txt").symlink_to("user@host.1234:5678")
    assert run(corpus, output)["left_out"]["files"] == {"broken link": 1}
    assert run(corpus, output)["already_prepared"]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("gpt2", "tokenizer 'gpt2': unknown; legal: 'bytes' or .*or train:VOCAB"),
        ("train:", "legal: train:VOCAB with a number"),
        ("train:2k", "legal: train:VOCAB with a number"),
        ("train:100", "train:100: .*at least 259"),
        ("train:99999", "train:99999: .*at most"),
        ("absent.model", r"absent.model: cannot be read"),
    ],
)
def test_bad_tokenizer(tokenizer, message, corpus, output):
    with pytest.raises(UserError, match=message):
        run(corpus, output, tokenizer)
    assert not output.exists() and not (output.parent.exists() and list(output.parent.iterdir()))


def test_bad_numbers(corpus, output):
    with pytest.raises(UserError, match="val_fraction 0: legal"):
        run(corpus, output, val_fraction=0)
    with pytest.raises(UserError, match="min_tokens -1: legal"):
        run(corpus, output, min_tokens=-1)


def test_workers_change_nothing(corpus, output, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(prepare_module, "_TASK_CHARACTERS", 200)
    alone = run(corpus, output, "train:300")
    together = run(corpus, tmp_path / "second", "train:300", num_workers=2)
    assert alone["digest"] == together["digest"]


def test_documents_are_consumed_no_faster_than_tokens():
    """However large the corpus, only a bounded number of tasks is ahead of the writer."""
    submitted = []

    class Executor:
        def submit(self, _, task):
            submitted.append(task)
            return type("Done", (), {"result": lambda self: [(split, np.arange(3)) for split, _ in task]})()

    endless = (("train", "x" * prepare_module._TASK_CHARACTERS) for i in iter(int, 1))
    tokenized = prepare_module._tokenized(endless, None, Executor(), max_pending=4)
    for number in range(20):
        next(tokenized)
        assert len(submitted) == number + 4


def test_stdlib_with_progress(output, capfd, monkeypatch):
    monkeypatch.setattr("ttt_e2e.progress.on_terminal", lambda: True)
    summary = prepare("stdlib", "bytes", output)
    assert summary["num_tokens"]["train"] > 5_000_000 and summary["num_tokens"]["val"] > 100_000
    out, err = capfd.readouterr()
    assert out == "" and "tokenizing" in err
    kvstore = {"driver": "file", "path": f"{output}/train/"}
    array = ts.open({"driver": "zarr3", "kvstore": kvstore}).result()
    assert array.dtype.name == "uint16" and array.read().result().max() == 256
