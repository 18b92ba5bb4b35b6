"""Paths in a bucket stay what they are, and lose no line; what cannot be reached is refused in one line."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from tests.evaluation.test_report import evaluate_long_contexts, make_run
from ttt_e2e import paths
from ttt_e2e.cli import main
from ttt_e2e.config import Config
from ttt_e2e.evaluation.records import Records
from ttt_e2e.evaluation.report import write_report
from ttt_e2e.evaluation.token_losses import _write
from ttt_e2e.runs import files
from ttt_e2e.runs.metrics import MetricsWriter, read_metrics


class Bucket(MemoryFileSystem):
    """Objects in memory. As in a bucket, they cannot grow: appending replaces."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]
    num_written = 0

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://"))

    def _open(self, path, mode="rb", **options):
        type(self).num_written += "r" not in mode
        return super()._open(path, mode.replace("a", "w"), **options)

    def mv(self, *arguments, **options):
        raise AssertionError("in a bucket, renaming copies")


@pytest.fixture
def bucket(monkeypatch):
    """The path of an empty directory."""
    backend = epath.Path("gs://bucket")._backend
    monkeypatch.setattr(backend, "fs", lambda path: Bucket())
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = ["", "/bucket"]
    return epath.Path("gs://bucket/runs")


def test_only_paths_of_this_machine_are_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert os.fspath(paths.absolute("a/b")) == f"{tmp_path}/a/b"
    for path in ("gs://bucket/a/b", epath.Path("gs://bucket") / "a/b"):
        assert os.fspath(paths.absolute(path)) == "gs://bucket/a/b"
    assert os.fspath(epath.Path("gs://bucket/a").resolve()) != "gs://bucket/a"  # which is why


REFUSED = {
    "train --config=CONFIG --workdir=s3://bucket/run": "--workdir is 's3://bucket/run', but it must be",
    "evaluate --config=CONFIG --checkpoint=http://x/y --output=DIR": "--checkpoint is 'http://x/y'",
    "generate --config=CONFIG --checkpoint=CONFIG --save_state=az://x/y": "--save_state is 'az://x/y'",
    "report --workdirs=DIR,file:///x --output=DIR": "--workdirs is 'file:///x', but",
    "train --config=gs://bucket/config.json --workdir=DIR": "--config is 'gs://bucket/config.json', but it must be a",
    "train --config=CONFIG --workdir=gs://bucket/run": "--workdir is 'gs://bucket/run', which needs the extra: pip",
    "train --config=CONFIG --workdir=DIR --config.train.init_from=gs://b/r": "config.train.init_from is 'gs://b/r', wh",
    "report --workdirs=gs://me:hunter2@bucket/run --output=DIR": "--workdirs is 'gs://<redacted>@bucket/run', which",
    "bench mixers --output=gs://bucket/run": "--output is 'gs://bucket/run', which needs the extra",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_is_out_of_reach_is_refused_in_one_line(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # not installed
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert main(command.replace("CONFIG", "config.json").replace("DIR", "here").split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {REFUSED[command]}")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_no_metric_is_lost_in_a_bucket(bucket, monkeypatch):
    bucket.mkdir(parents=True)
    writer = MetricsWriter(bucket, Config(), resume_step=0)
    Bucket.num_written = 0
    for step in range(1, 101):
        writer.write(step, {"loss": 1 / step})
    assert Bucket.num_written == 0  # not for every line
    writer.flush()
    assert [line["step"] for line in read_metrics(bucket / "metrics.jsonl")] == [*range(1, 101)]
    monkeypatch.setattr(files, "SECONDS_BETWEEN_WRITES", -1)
    writer.write(101, {"loss": 0.0})
    assert len(read_metrics(bucket / "metrics.jsonl")) == 101
    writer.close()
    writer = MetricsWriter(bucket, Config(), resume_step=50)
    writer.write(51, {"loss": 0.5})
    writer.close()
    assert [line["step"] for line in read_metrics(bucket / "metrics.jsonl")] == [*range(1, 52)]


def test_no_record_is_lost_in_a_bucket(bucket):
    records = Records(bucket, "toy", {"a": 1}, key=("n",))
    for n in range(3):
        records.add([{"n": n, "nll": 0.5}])
    again = Records(bucket, "toy", {"a": 1}, key=("n",))  # after a kill
    assert list(again.done) == [(0,), (1,), (2,)]
    again.finish({"sum": 1.5})
    assert json.loads((bucket / "toy.json").read_text()) == {"sum": 1.5, "about": {"a": 1}}
    assert sorted(path.name for path in bucket.iterdir()) == ["toy.json", "toy.jsonl"]


def test_a_report_reads_and_writes_in_a_bucket(bucket, monkeypatch, tmp_path):
    """The same as on disk."""
    run = evaluate_long_contexts(make_run(tmp_path / "run", steps=20))
    for path in filter(Path.is_file, run.rglob("*")):
        Bucket().pipe(f"gs://bucket/runs/run/{path.relative_to(run)}", path.read_bytes())
    monkeypatch.chdir(tmp_path)
    here = write_report([run], tmp_path / "out")
    there = write_report(["gs://bucket/runs/run"], "gs://bucket/out")
    assert there["rows"] == here["rows"]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert sorted(path.name for path in epath.Path("gs://bucket/out").iterdir()) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]  # no directory named gs:


def test_results_of_an_evaluation_are_written_into_a_bucket(bucket):
    _write(bucket, {"loss": 1.0}, {"token_nll": np.ones((2, 3))})
    assert sorted(path.name for path in bucket.iterdir()) == ["metrics.json", "token_nll.npy"]
