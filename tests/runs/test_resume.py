"""What a run may be resumed with: another run is refused, another schedule is said, the rest is free."""

import dataclasses
import json

import pytest

from tests.tiny_run import tiny_run
from ttt_e2e.config import Config, each_field, to_dict
from ttt_e2e.config.fields import FREE, LOGGED, REFUSED
from ttt_e2e.errors import UserError
from ttt_e2e.runs import directory as run_directory
from ttt_e2e.runs.directory import claim, record_start


@pytest.fixture
def begun(token_store, tmp_path):
    """A run directory with one checkpoint, and its config."""
    config = tiny_run(token_store)
    claim(tmp_path / "run", config)
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    return tmp_path / "run", config


def changed(config, name: str, value):
    section, _, field = name.partition(".")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{field: value})})


def written(workdir) -> dict:
    return json.loads((workdir / "config.json").read_text())


CHANGES = {
    "model.hidden_size": (32, REFUSED),
    "model.mixer": ("attention", REFUSED),
    "inner.learning_rate": (0.25, REFUSED),
    "inner.mini_batch_size": (16, REFUSED),
    "inner.gradient": ("first_order", REFUSED),
    "inner.trajectory": ("delta", LOGGED),
    "inner.remat": ("block", FREE),
    "train.seq_len": (16, REFUSED),
    "train.global_batch_size": (4, REFUSED),
    "train.seed": (1, REFUSED),
    "train.num_steps": (9, FREE),
    "train.accumulation_steps": (2, FREE),
    "optimizer.name": ("muon", REFUSED),
    "optimizer.b2": (0.99, REFUSED),
    "optimizer.weight_decay": (0.0, REFUSED),
    "optimizer.train_only": ("^fast", REFUSED),
    "optimizer.learning_rate": (1e-3, LOGGED),
    "optimizer.decay_steps": (9, LOGGED),
    "data.seed": (1, REFUSED),
    "data.shuffle": (False, REFUSED),
    "data.bos_id": (2, REFUSED),
    "data.path": ("moved", FREE),
    "data.eval_split": ("train", LOGGED),
    "mesh.data": (2, FREE),
    "checkpoint.keep": (5, FREE),
    "log.every_steps": (7, FREE),
    "eval.num_sequences": (3, LOGGED),
    "eval.every_steps": (2, FREE),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_field_is_refused_or_logged_or_free(name, begun, caplog):
    workdir, config = begun
    value, rule = CHANGES[name]
    section, _, field = name.partition(".")
    before = written(workdir)
    ours = changed(config, name, value)
    if rule == REFUSED:
        message = (
            f"workdir {workdir} holds a run whose {name} is {before[section][field]!r}, but the config says {value!r}"
        )
        with pytest.raises(UserError) as error:
            claim(workdir, ours)
        assert str(error.value).startswith(message)
        assert f"--config.{name}={before[section][field]}" in str(error.value)
        assert written(workdir) == before
        return
    claim(workdir, ours)
    assert written(workdir) == to_dict(ours)
    said = f"config.{name} is {value!r} from here on; until now it was {before[section][field]!r}"
    assert [record.getMessage() for record in caplog.records] == ([said] if rule == LOGGED else [])


def test_every_field_has_a_rule():
    assert {f.metadata["resume"] for _, f, _ in each_field(Config())} == {REFUSED, LOGGED, FREE}


def test_before_the_first_checkpoint_only_another_model_is_refused(begun, caplog):
    workdir, config = begun
    (workdir / "checkpoints" / "3").rmdir()
    claim(workdir, changed(config, "train.global_batch_size", 4))
    assert not caplog.records
    with pytest.raises(UserError, match=r"model.hidden_size is 16, but the config says 32"):
        claim(workdir, changed(config, "model.hidden_size", 32))


def test_other_code_is_said(begun, caplog, monkeypatch):
    workdir, _ = begun
    code = {"revision": "a1", "diff": "", "untracked": []}
    monkeypatch.setattr(run_directory, "_code", lambda *_: dict(code))
    for _ in range(2):
        record_start(workdir, [], {})
    assert not caplog.records
    code["revision"] = "b2"
    record_start(workdir, [], {})
    assert [record.getMessage() for record in caplog.records] == ["revision is b2 from here on; until now it was a1"]
    caplog.clear()
    (workdir / "starts" / "4.diff").write_text("+x = 1\n")
    code["diff"] = "starts/4.diff"
    record_start(workdir, [], {})
    assert "uncommitted changes are starts/4.diff from here on, not none" in caplog.text
    caplog.clear()
    (workdir / "starts.jsonl").write_text("not a start\n")  # a record, and nothing that a run needs
    record_start(workdir, [], {})
    assert not caplog.records
