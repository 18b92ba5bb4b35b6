"""A run keeps its tokenizer and the place of its text: others at the same path are refused or said, and not needed."""

import json
import logging
import shutil

import numpy as np
import pytest

from tests.tiny_run import tiny_run
from ttt_e2e import cli
from ttt_e2e.checkpoints.progress import progress_of
from ttt_e2e.config import Config
from ttt_e2e.data.mixture import absolute_path
from ttt_e2e.data.store import TokenWriter, write_attributes
from ttt_e2e.data.tokenizers import load_tokenizer, train_sentencepiece
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.subject import Subject, open_evaluated
from ttt_e2e.evaluation.text_bytes import TextBytes
from ttt_e2e.inference import generate
from ttt_e2e.inference.prompts import find_tokenizer
from ttt_e2e.runs.data_record import find_data_record, write_data_record
from ttt_e2e.runs.directory import write_config
from ttt_e2e.train import loop
from ttt_e2e.train.batches import open_store

V, BOS = 300, 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tokenizers of the same vocabulary size and BOS, as files."""
    directory, random = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    for name, letters in (("a", "abcdefgh"), ("b", "ijklmnop")):
        texts = ["".join(random.choice(list(letters), 6)) + " " + letters for _ in range(200)]
        train_sentencepiece(texts, V, directory / f"{name}.model")
    return directory


def make_store(path, model="", seed=0):
    """A store of random tokens, with the tokenizer of a model file; "" = it names none."""
    for split, count in (("train", 400), ("val", 100)):
        writer = TokenWriter(path, split, V)
        writer.append(np.random.default_rng(seed).integers(2, V, count))
        writer.close()
    attributes = {"vocab_size": V, "bos_id": BOS, "digest": {"train": str(seed)}}
    if model:
        shutil.copy(model, path / "tokenizer.model")
        attributes["tokenizer"] = "tokenizer.model"
    write_attributes(path, attributes)
    return path


def make_config(path, **data) -> Config:
    return tiny_run(path, model={"vocab_size": V}, data={"path": str(path), "bos_id": BOS, **data})


def make_run(workdir, config):
    """What a run leaves on disk, as far as it matters here: no parameters."""
    store = open_store(config, "train")
    write_config(workdir, config)
    write_data_record(workdir, config, store.tokenizer_spec or config.data.tokenizer)
    (workdir / "checkpoints/1/params").mkdir(parents=True)
    (workdir / "checkpoints/1/progress").mkdir()
    progress = progress_of(1, 1, config, data=store.fingerprint)
    (workdir / "checkpoints/1/progress/metadata").write_text(json.dumps(progress))
    return workdir / "checkpoints/1"


@pytest.fixture
def run(tmp_path, monkeypatch, models):
    """(the config, the checkpoint) of a run in tmp_path/run, on the relative path of the store tmp_path/here/store."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make_store(tmp_path / "here/store", models / "a.model")
    config = make_config("store")
    return config, make_run(tmp_path / "run", config)


def fingerprint(path) -> str:
    return load_tokenizer(path).fingerprint


def test_a_store_that_is_not_there_is_named_by_its_absolute_path(run, tmp_path, monkeypatch):
    config, checkpoint = run
    monkeypatch.chdir(tmp_path / "there")
    for open_it in (
        lambda: open_store(config, "val", checkpoint),  # evaluate
        lambda: open_store(config, "train", tmp_path / "run"),  # train, to resume
        lambda: Subject(config, str(checkpoint)).store,
    ):
        with pytest.raises(UserError) as error:
            open_it()
        assert f"no zarr.json in {tmp_path}/there/store" in str(error.value)
        assert f"the run was trained on --config.data.path={tmp_path}/here/store" in str(error.value)
    with pytest.raises(UserError) as error:  # no run is known
        open_store(config, "val")
    assert f"in {tmp_path}/there/store" in str(error.value) and "was trained on" not in str(error.value)
    with pytest.raises(UserError) as error:  # an absolute path is said once
        open_store(make_config(tmp_path / "no"), "val")
    assert str(error.value).count("/no") == 1


def test_the_absolute_path_of_a_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_path("a") == f"{tmp_path}/a" and absolute_path("/a") == "/a"
    assert absolute_path("a:0.7, ../b:0.3") == f"{tmp_path}/a:0.7,{tmp_path.parent}/b:0.3"
    assert absolute_path("gs://x/a:1,b:2") == f"gs://x/a:1,{tmp_path}/b:2"


def test_another_text_is_said_and_evaluated(run, tmp_path, monkeypatch, models, caplog):
    config, checkpoint = run

    def said(config) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ttt_e2e"):
            assert open_evaluated(config, checkpoint).num_tokens == 100
        return [record.getMessage() for record in caplog.records]

    assert said(config) == []
    [line] = said(make_config(str(make_store(tmp_path / "other", models / "a.model", seed=1))))  # on purpose
    assert line == f"{tmp_path}/other is another text than the model was trained on, {tmp_path}/here/store"
    # Of the same name, from another directory.
    make_store(tmp_path / "there/store", models / "a.model", seed=1)
    monkeypatch.chdir(tmp_path / "there")
    assert f"trained on, {tmp_path}/here/store" in said(config)[0]
    monkeypatch.chdir(tmp_path / "here")
    # At the same path.
    shutil.rmtree("store")
    make_store(tmp_path / "here/store", models / "a.model", seed=1)
    assert said(config) == [f"{tmp_path}/here/store is another text than the model was trained on"]
    # A copy of the same text is the same, and one of held-out text alone another.
    shutil.rmtree("store")
    make_store(tmp_path / "here/store", models / "a.model")
    assert said(config) == []
    shutil.copytree("store", tmp_path / "copy")
    assert said(make_config(tmp_path / "copy")) == []
    shutil.rmtree(tmp_path / "copy/train")
    assert len(said(make_config(tmp_path / "copy"))) == 1


def test_another_tokenizer_is_refused(run, tmp_path, models, monkeypatch):
    config, checkpoint = run
    shutil.copy(models / "b.model", "store/tokenizer.model")  # at the same path, and the attributes are the same
    message = (
        "a token store of tokenizer store/tokenizer.model, but {} was trained with another, .*/run/tokenizer.model"
    )
    for open_it in (
        lambda: open_evaluated(config, checkpoint),
        lambda: Subject(config, str(tmp_path / "run")).store,
        lambda: open_store(config, "train", tmp_path / "run"),
    ):
        with pytest.raises(UserError, match=message.format("the run")):
            open_it()

    def no_step(*_):
        raise AssertionError("no run should begin")

    monkeypatch.setattr(loop, "restore_or_init", no_step)
    for field in ("init_from", "base"):
        ours = tiny_run(
            "store",
            model={"vocab_size": V},
            train={field: str(tmp_path / "run")},
            data={"path": "store", "bos_id": BOS},
            eval={"every_steps": 0},
        )
        with pytest.raises(UserError, match=message.format(f"the run of config.train.{field}")):
            loop.train(ours, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    # The control: with its own tokenizer the run begins.
    shutil.copy(models / "a.model", "store/tokenizer.model")
    with pytest.raises(AssertionError, match="no run should begin"):
        loop.train(ours, tmp_path / "new")


def test_a_store_without_its_tokenizer_is_evaluated(run, tmp_path):
    """Its tokens are known by their digest: nothing is read that is not needed."""
    config, checkpoint = run
    (tmp_path / "here/store/tokenizer.model").unlink()
    assert open_evaluated(config, checkpoint).num_tokens == 100
    assert TextBytes.of(config, checkpoint).tokenizer == find_tokenizer(config, checkpoint).fingerprint


def test_a_run_goes_on_with_the_tokenizer_that_it_keeps(run, tmp_path, models, monkeypatch, capsys):
    config, checkpoint = run
    own = fingerprint(models / "a.model")
    shutil.copy(models / "b.model", "tokenizer.model")  # in the working directory
    assert find_tokenizer(config, checkpoint).fingerprint == own
    shutil.copy(models / "b.model", "store/tokenizer.model")
    assert find_tokenizer(config, checkpoint).fingerprint == own
    shutil.rmtree("store")
    assert find_tokenizer(config, checkpoint).fingerprint == own
    assert Subject(config, str(checkpoint)).tokenizer.fingerprint == own

    class Reached(Exception):
        pass

    def reach(*_):
        raise Reached

    monkeypatch.setattr(generate, "load_reader", reach)
    with pytest.raises(Reached):  # the command has its tokenizer, and goes on to the model
        cli.main(["generate", f"--workdir={tmp_path}/run", "--prompt=abc"])
    # A directory that was moved keeps it, too.
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert find_tokenizer(config, tmp_path / "moved").fingerprint == own
    # Another that is asked for is refused, the same under another name is not.
    shutil.copy(models / "a.model", "mine.model")
    assert find_tokenizer(make_config("", tokenizer="mine.model"), tmp_path / "moved").fingerprint == own
    for other, message in ((f"{models}/b.model", "trained with another"), ("no.model", "cannot be read")):
        with pytest.raises(UserError, match=message):
            find_tokenizer(make_config("", tokenizer=other), tmp_path / "moved")
    shutil.copy(models / "b.model", tmp_path / "moved/tokenizer.model")
    with pytest.raises(UserError, match=r"moved/tokenizer\.model was changed"):
        find_tokenizer(config, tmp_path / "moved")
    capsys.readouterr()


def test_what_a_run_keeps(tmp_path, models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "none")
    for run in ("run", "bytes", "unknown"):
        write_config(run, make_config("none"))
    path = str(models / "a.model")
    write_data_record("run", make_config("none", tokenizer=path), path)
    record = find_data_record("run")
    assert (record.path, record.asked, record.tokenizer) == (f"{tmp_path}/none", path, "tokenizer.model")
    assert record.tokenizer_spec == f"{tmp_path}/run/tokenizer.model"
    assert (tmp_path / "run/tokenizer.model").read_bytes() == (models / "a.model").read_bytes()
    for gone in ("", "gone.model"):  # resumed, and no longer told which it is, or it is no longer there
        write_data_record("run", make_config("none"), gone)
        assert find_data_record("run") == record._replace(asked="")
    write_data_record("bytes", make_config("none"), "bytes")
    write_data_record("unknown", make_config("none"), "absent.model")  # training does without
    for run, tokenizer in (("bytes", "bytes"), ("unknown", "")):
        record = find_data_record(run)
        assert (record.tokenizer, record.tokenizer_spec, record.digest) == (tokenizer,) * 3
        assert sorted(file.name for file in (tmp_path / run).iterdir()) == ["config.json", "data.json"]
    (tmp_path / "bytes/data.json").write_text('{"path": 3}')
    with pytest.raises(UserError, match=r"bytes/data.json is damaged"):
        find_data_record("bytes")
    assert find_data_record("") is None and find_data_record(tmp_path) is None


def test_a_store_s_own_tokenizer_comes_before_a_file_of_its_name(tmp_path, models, monkeypatch):
    """Of a checkpoint in no run: the name that a store records means its own."""
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "store", models / "a.model")
    shutil.copy(models / "b.model", "tokenizer.model")
    own = fingerprint(models / "a.model")
    for asked in (
        "",
        "tokenizer.model",
        "store/tokenizer.model",
        str(models / "a.model"),
        "./store/../store/tokenizer.model",
    ):
        config = make_config("store", tokenizer=asked)
        assert find_tokenizer(config).fingerprint == own
        assert open_store(config, "train").num_tokens == 400  # the contents are compared, not the names
    for asked in ("./tokenizer.model", str(models / "b.model")):
        with pytest.raises(UserError, match=r"was prepared with 'tokenizer\.model'"):
            open_store(make_config("store", tokenizer=asked), "train")
    # Without a store there, a file that is there will do.
    assert find_tokenizer(make_config("gone", tokenizer="tokenizer.model")).fingerprint != own
    with pytest.raises(UserError, match="gone: no token store there"):
        find_tokenizer(make_config("gone"))
