"""The run directory says which code ran, under which config; and no credential."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tiny_run import tiny_run
from ttt_e2e.config import to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.runs import directory as run_directory
from ttt_e2e.runs.directory import claim, record_start
from ttt_e2e.runs.secrets import redact

PACKAGE = Path(run_directory.__file__).parents[1]


def git(directory, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(["git", "-C", directory, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout that the package seems to run from, with one commit."""
    root = tmp_path / "checkout"
    (root / "ttt_e2e" / "outer").mkdir(parents=True)
    (root / "ttt_e2e" / "__init__.py").write_text("first = 1\n")
    (root / ".gitignore").write_text("ignored\n")
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=first")
    monkeypatch.setattr(run_directory, "__file__", str(root / "ttt_e2e" / "outer" / "run_directory.py"))
    return root


def last_start(workdir) -> dict:
    return json.loads((workdir / "starts.jsonl").read_text().splitlines()[-1])


def test_each_start_keeps_its_revision_difference_and_config(checkout, token_store, tmp_path):
    workdir = tmp_path / "run"
    config = tiny_run(token_store)
    claim(workdir, config)
    record_start(workdir, [], {})
    revision = git(checkout, "rev-parse", "HEAD")
    first = last_start(workdir)
    assert (first["revision"], first["diff"], first["untracked"]) == (revision, "", [])

    (checkout / "ttt_e2e" / "__init__.py").write_text("second = 2\n")
    (checkout / "new.py").write_text("content of a new file")
    (checkout / "ignored").write_text("x")
    changed = dataclasses.replace(config, log=dataclasses.replace(config.log, every_steps=7))
    claim(workdir, changed)
    record_start(workdir, ["--config.log.every_steps=7"], {})
    second = last_start(workdir)
    assert (second["revision"], second["diff"], second["untracked"]) == (f"{revision}+", "starts/2.diff", ["new.py"])
    git(checkout, "checkout", "--quiet", ".")
    git(checkout, "apply", str(workdir / second["diff"]))
    assert (checkout / "ttt_e2e" / "__init__.py").read_text() == "second = 2\n"
    configs = [json.loads((workdir / start["config"]).read_text()) for start in (first, second)]
    assert configs == [to_dict(config), to_dict(changed)]


def test_the_difference_is_bounded(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "MAX_DIFF_BYTES", 1000)
    monkeypatch.setattr(run_directory, "MAX_UNTRACKED", 2)
    (checkout / "ttt_e2e" / "__init__.py").write_text("é = 1\n" * 1000)
    for i in range(5):
        (checkout / f"new{i}").touch()
    record_start(tmp_path / "run", [], {})
    text = (tmp_path / "run" / "starts" / "1.diff").read_text()
    assert len(text.encode()) < 1100
    assert text.endswith("bytes in all]\n")
    assert last_start(tmp_path / "run")["untracked"] == ["new0", "new1", "[and 3 more]"]


@pytest.mark.parametrize("inside_another", (False, True))
def test_outside_of_a_checkout_there_is_no_revision(inside_another, checkout, tmp_path, monkeypatch):
    """Also where the package is installed in an environment that lies in somebody's checkout."""
    parent = checkout / "ignored" if inside_another else tmp_path
    shutil.copytree(checkout / "ttt_e2e", parent / "site" / "ttt_e2e")
    monkeypatch.setattr(run_directory, "__file__", str(parent / "site" / "ttt_e2e" / "outer" / "run_directory.py"))
    record_start(tmp_path / "run", [], {})
    start = last_start(tmp_path / "run")
    assert (start["revision"], start["diff"], start["untracked"]) == ("", "", [])
    assert list((tmp_path / "run" / "starts").iterdir()) == []


def test_no_credential_reaches_the_run_directory(checkout, token_store, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "0123456789abcdef")
    monkeypatch.setenv("HARMLESS", "a value of the environment")
    (checkout / "ttt_e2e" / "__init__.py").write_text("key = '0123456789abcdef'  # https://me:hunter2@host/x\n")
    claim(tmp_path / "run", tiny_run(token_store))
    overrides = ["--config.data.path=s3://me:hunter2@bucket/x", "--config.log.wandb=0123456789abcdef"]
    record_start(tmp_path / "run", overrides, {})
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.json", "starts.jsonl", "1.json", "1.diff"} == {path.name for path in files}
    everything = "".join(path.read_text() for path in files)
    assert "<redacted>" in everything
    for secret in ("hunter2", "0123456789abcdef", "a value of the environment"):
        assert secret not in everything


@pytest.mark.parametrize(
    "value", ("gs://me:hunter2@bucket/x", "https://host/x?X-Amz-Signature=hunter2", "hunter2hunter2")
)
def test_a_config_with_a_credential_is_refused_before_anything_is_written(value, token_store, tmp_path, monkeypatch):
    monkeypatch.setenv("STORE_PASSWORD", "hunter2hunter2")
    config = tiny_run(token_store)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=value))
    with pytest.raises(UserError, match=r"^config.data.path holds a credential") as raised:
        claim(tmp_path / "run", config)
    assert "hunter2" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_what_is_no_credential_stays(monkeypatch):
    monkeypatch.setenv("TOKENIZER", "data/tokenizer.model")
    monkeypatch.setenv("DEBUG_TOKEN", "1")
    for text in ("data/tokenizer.model", "step 1 of 10", "ssh://git@host:22/x", "gs://bucket/a:b@c", "C:/x?seed=1"):
        assert redact(text) == text
