"""A run in a bucket of Google Cloud Storage: an emulator of it, to which gcsfs and TensorStore's client talk."""

import json
import os
import socket
from contextlib import suppress

import numpy as np
import pytest
from etils import epath
from fsspec.asyn import AsyncFileSystem

from tests.parity.golden import load_case
from tests.test_cli import case_config_file
from tests.tiny_run import tiny_run
from ttt_e2e import paths
from ttt_e2e.checkpoints.steps import find_step, saved_steps
from ttt_e2e.cli import main
from ttt_e2e.config import to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.runs.metrics import read_metrics

gcsfs = pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
server = pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The path of a bucket of an emulator in this process; no directory named `gs:` may be made in the working one."""
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    emulator = server.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    emulator.start()
    url = f"http://localhost:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("working"))
        patch.setenv("STORAGE_EMULATOR_HOST", url)  # of gcsfs, and of Google's client, which Orbax uses
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks what the emulator does not know
        # The emulator does not know how to move an object, but how to copy one.
        patch.setattr(gcsfs.GCSFileSystem, "_mv_file", AsyncFileSystem._mv_file)
        paths.check("--workdir", "gs://bucket/runs")
        yield epath.Path("gs://bucket")
        assert os.listdir() == []
    with suppress(Exception):
        emulator.stop()


@pytest.fixture(scope="module")
def run(bucket, token_store, tmp_path_factory):
    """The flags of a run of six steps in the bucket, which was stopped after three and resumed."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    fields = {"model": {"vocab_size": 257}, "data": {"path": str(token_store), "bos_id": 1, "tokenizer": "bytes"}}
    path.write_text(json.dumps(to_dict(tiny_run(token_store, **fields))))
    workdir = f"--workdir={bucket / 'run'}"
    assert main(["train", f"--config={path}", workdir, "--config.train.num_steps=3"]) == 0
    assert saved_steps(bucket / "run/checkpoints") == [3]
    assert main(["train", f"--config={path}", workdir]) == 0
    return workdir


def test_a_run_in_a_bucket_is_saved_and_resumed(bucket, run):
    assert saved_steps(bucket / "run/checkpoints") == [3, 6]
    lines = read_metrics(bucket / "run/metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    starts = (bucket / "run/starts.jsonl").read_text().splitlines()
    assert len(starts) == 2 and (bucket / "run/starts/2.json").exists()


def test_a_damaged_step_is_set_aside_and_the_run_goes_on_from_the_one_before(bucket, run, caplog):
    (params,) = (bucket / "run/checkpoints/6/params/d").iterdir()
    whole = params.read_bytes()
    params.write_bytes(whole[: len(whole) // 2])
    assert main(["train", run, "--config.train.num_steps=6"]) == 0
    assert saved_steps(bucket / "run/checkpoints") == [3, 6]
    assert "set aside as gs://bucket/run/checkpoints/6.damaged; going back to step 3" in caplog.text
    assert (bucket / "run/checkpoints/6.damaged/params/_METADATA").exists()
    lines = [line["step"] for line in read_metrics(bucket / "run/metrics.jsonl") if "loss" in line]
    assert lines == [1, 2, 3, 4, 5, 6]


def test_steps_that_were_not_finished_are_no_steps(bucket, run):
    """As a kill leaves them: without the file by which Orbax says that a step is whole."""
    for name in ("params/_METADATA", "progress/metadata"):
        (bucket / "run/checkpoints/9" / name).write_bytes(b"{}")
    try:
        assert saved_steps(bucket / "run/checkpoints") == [3, 6]
        assert os.fspath(find_step(bucket / "run")) == "gs://bucket/run/checkpoints/6"
        with pytest.raises(UserError, match="checkpoint gs://bucket/run/checkpoints/9 holds no complete step"):
            find_step(bucket / "run/checkpoints/9")
        with pytest.raises(UserError, match="checkpoint gs://bucket/nothing does not exist"):
            find_step("gs://bucket/nothing")
    finally:
        (bucket / "run/checkpoints/9").rmtree()


def test_what_a_run_in_a_bucket_learned_is_measured_there(bucket, run, capsys):
    assert main(["evaluate", run]) == 0
    metrics = json.loads((bucket / "run/evaluation/metrics.json").read_text())
    assert metrics["step"] == 6
    with (bucket / "run/evaluation/token_nll.npy").open("rb") as file:
        assert np.load(file).mean() == pytest.approx(metrics["loss"], rel=0.05)
    assert main(["report", f"--workdirs={bucket / 'run'}", f"--output={bucket / 'report'}"]) == 0
    assert (bucket / "report/loss_by_position.png").exists()


def test_states_are_saved_in_a_bucket(bucket, run, capsys):
    state, tokens = bucket / "state", ("--max_new_tokens=3", "--seed=1")
    assert main(["generate", run, "--prompt=some text", "--max_new_tokens=0", f"--save_state={state}"]) == 0
    output = bucket / "out.jsonl"
    assert main(["generate", run, f"--load_state={state}", *tokens, f"--output={output}"]) == 0
    (result,) = map(json.loads, output.read_text().splitlines())
    assert len(result["tokens"]) == 3
    capsys.readouterr()
    assert main(["generate", run, "--prompt=a", f"--save_state={state}"]) == 2
    assert "gs://bucket/state already exists" in capsys.readouterr().err
    (state / "commit_success.txt").unlink()
    assert main(["generate", run, f"--load_state={state}"]) == 2
    assert "gs://bucket/state holds no saved state" in capsys.readouterr().err


def test_a_checkpoint_is_imported_into_a_bucket(bucket, tmp_path, capsys):
    case = load_case("e2e_tied")
    config = case_config_file(case, tmp_path / "config.py")
    flags = ["--source=official", f"--config={config}", f"--checkpoint={case.path / 'checkpoint'}"]
    assert main(["import", *flags, f"--output={bucket / 'imported'}"]) == 0
    assert capsys.readouterr().out == "imported as gs://bucket/imported/0\n"
    assert os.fspath(find_step(bucket / "imported")) == "gs://bucket/imported/0"


def test_a_bucket_that_there_is_not_is_said_before_any_work(bucket, capsys, monkeypatch):
    assert main(["report", "--workdirs=gs://nowhere/run", "--output=out"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith("error: --workdirs is 'gs://nowhere/run', which cannot be reached (")
