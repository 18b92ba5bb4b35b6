"""Sweeps: what is a point, what runs, what is left alone, and what a kill leaves.

All but the last test train nothing: a stub stands for `ttt-e2e`, so that the tests decide when a run ends, and how.
"""

import errno
import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ttt_e2e.data.store import TokenWriter, write_attributes
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.runs import read_runs
from ttt_e2e.sweep import make_points

ROOT = Path(__file__).parents[2]
NUM_STEPS = 3

# A run as a launcher sees it: starts are counted; `hold` keeps it from ending; SIGTERM makes it save and exit with 75.
STUB = f"""
import json, os, pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[2].removeprefix("--workdir="))
assert sys.argv[1] == "train" and (workdir / "config.json").is_file()
with open(workdir / "starts", "a") as file:
    file.write(f"{{os.getpid()}} {{sys.argv[3:]}}\\n")

def save(step):
    for file in ("params/_METADATA", "optimizer/_METADATA", "progress/metadata"):
        (workdir / "checkpoints" / str(step) / file).parent.mkdir(parents=True, exist_ok=True)
        (workdir / "checkpoints" / str(step) / file).touch()
    (workdir / "checkpoints" / str(step) / "progress" / "metadata").write_text(json.dumps({{"step": step}}))

def stop(*_):
    save(1)
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
(workdir / "ready").touch()
if (workdir.parent / "preempt").exists() and not (workdir / "checkpoints").exists():
    stop()
while (workdir.parent / "hold").exists():
    time.sleep(0.01)
if (workdir.parent / "fail").exists():
    print("no space left")
    sys.exit(3)
with open(workdir / "metrics.jsonl", "w") as file:
    file.write(json.dumps({{"step": {NUM_STEPS}, "loss": 1.5}}) + "\\n")
save({NUM_STEPS})
"""


@pytest.fixture(scope="module")
def sweep():
    """launch/sweep.py as a module."""
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "launch" / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_config_file(path, sweeps, data="nowhere"):
    path.write_text(
        f"""
from ttt_e2e.config import default_config

def get_config(arg=""):
    config = default_config()
    config.model.update(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_fast_blocks=1)
    config.model.sliding_window = 0 if arg == "full" else 8
    config.inner.mini_batch_size = 8
    config.train.update(seq_len=16, global_batch_size=8, num_steps={NUM_STEPS})
    config.optimizer.warmup_steps = 1
    config.data.path = {str(data)!r}
    config.mesh.data = 1
    return config

def sweep():
    return {sweeps!r}
"""
    )
    return str(path)


@pytest.fixture
def config_file(tmp_path):
    return write_config_file(tmp_path / "config.py", {"train.seed": [0, 1], "inner.learning_rate": [0.5, 1]})


NAMES = [f"train.seed={seed}_inner.learning_rate={rate}" for seed in (0, 1) for rate in ("0.5", "1.0")]


def test_a_directory_that_cannot_be_made_is_said_at_once(sweep, config_file, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert sweep.main([f"--config={config_file}", f"--output={tmp_path}/file/out"]) == 2
    assert re.fullmatch(r"error: --output .*file/out cannot be written .*Not a directory.*\n", capsys.readouterr().err)


def test_a_point_for_which_there_is_no_room_is_said_and_the_others_go_on(sweep, config_file, tmp_path, monkeypatch):
    [first, *_] = points = sweep.make_points(str(config_file), [], [], tmp_path)
    first.workdir.write_text("mine")
    outcomes, _ = sweep.run_here(points, "true", 2)
    assert "cannot be written" in outcomes.pop(first.name)
    assert len(outcomes) == 3 and not any("cannot be written" in outcome for outcome in outcomes.values())


@pytest.fixture
def launch(sweep, config_file, tmp_path):
    """Runs launch/sweep.py in this process on four points, whose runs are stubs."""
    (tmp_path / "stub.py").write_text(STUB)

    def run(*arguments):
        launcher = f"--launcher={sys.executable} {tmp_path / 'stub.py'}"
        return sweep.main([f"--config={config_file}", f"--output={tmp_path / 'out'}", launcher, *arguments])

    return run


def write_checkpoint(workdir, step=NUM_STEPS):
    """What a sweep looks at of one."""
    directory = workdir / "checkpoints" / str(step)
    for file in ("params/_METADATA", "optimizer/_METADATA", "progress/metadata"):
        (directory / file).parent.mkdir(parents=True)
        (directory / file).touch()
    (directory / "progress" / "metadata").write_text(json.dumps({"step": step}))


def starts(directory) -> dict[str, int]:
    return {name: len((directory / name / "starts").read_text().splitlines()) for name in NAMES}


def wait_for(condition):
    while not condition():
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------------------------- the points


def points_of(tmp_path, sweeps, *overrides, chosen=(), arg=""):
    return make_points(write_config_file(tmp_path / "c.py", sweeps) + arg, list(overrides), list(chosen), tmp_path)


def test_points_are_the_product_of_the_named_sweeps(tmp_path):
    sizes = [{"model.hidden_size": 32, "model.num_attention_heads": 2}, {"model.hidden_size": 64}]
    points = points_of(tmp_path, {"size": sizes, "train.seed": [3, 4]}, "--config.train.num_steps=9")
    found = [(p.config.model.hidden_size, p.config.model.num_attention_heads, p.config.train.seed) for p in points]
    assert found == [(32, 2, 3), (32, 2, 4), (64, 4, 3), (64, 4, 4)]
    assert {(p.config.train.num_steps, p.config.optimizer.decay_steps) for p in points} == {(9, 9)}
    assert points[0].name == "model.hidden_size=32_model.num_attention_heads=2_train.seed=3"
    assert [p.name for p in points_of(tmp_path, {"size": sizes, "train.seed": [3]}, chosen=["train.seed"])] == [
        "train.seed=3"
    ]


def test_a_name_depends_on_the_values_alone(tmp_path):
    (one,) = points_of(tmp_path, {"inner.learning_rate": [1]})
    other, _ = points_of(tmp_path, {"rate": [{"inner.learning_rate": 1.0}, {"inner.learning_rate": 2.0}]})
    assert one.name == other.name == "inner.learning_rate=1.0"
    paths = [p.name for p in points_of(tmp_path, {"data.path": ["a/b", "a-b", "c," * 200]})]
    assert len(set(paths)) == 3
    assert all("/" not in name and "," not in name and len(name) < 200 for name in paths)


def test_arg_chooses_the_config(tmp_path):
    window, full = points_of(tmp_path, {"arg": ["window", "full"]})
    assert (window.config.model.sliding_window, full.config.model.sliding_window) == (8, 0)


@pytest.mark.parametrize(
    ("sweeps", "arguments", "message"),
    (
        ({}, (), "takes a dict of named sweeps"),
        ({"train.seed": 3}, (), "'train.seed': 3, but it takes a list"),
        ({"train.seed": []}, (), "takes a list"),
        ({"seed": [1]}, (), "'seed' in 'seed', but a field is section.field"),
        ({"train.sed": [1]}, (), "no field 'sed': did you mean 'seed'"),
        ({"train.seed": ["one"]}, (), "config.train.seed is 'one', but it takes one integer"),
        ({"train.seed": [1], "s": [{"train.seed": 2}]}, (), "sets train.seed, which another of its sweeps sets too"),
        ({"train.seed": [1]}, ("--config.train.seed=2",), "sets train.seed, which --config sets too"),
        ({"inner.learning_rate": [1, 1.0]}, (), "2 points that are the same"),
        ({"data.path": ["s3://me:hunter2@host/x"]}, (), "config.data.path holds a credential"),
    ),
)
def test_a_bad_sweep_is_one_line(sweeps, arguments, message, tmp_path):
    with pytest.raises(UserError, match=message) as raised:
        points_of(tmp_path, sweeps, *arguments)
    assert "\n" not in str(raised.value)
    assert "hunter2" not in str(raised.value)


# --------------------------------------------------------------------------------------------------------- running here


def test_a_dry_run_prints_everything_and_writes_nothing(launch, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert launch("--dry_run") == 0
    printed = capsys.readouterr().out
    for name in NAMES:
        assert f"train --workdir={tmp_path}/out/{name}\n" in printed
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in str(path)) == before


def test_every_point_runs_once_and_a_second_launch_runs_none(launch, tmp_path, capsys):
    assert launch("--parallel=3") == 0
    assert "4 of 4 points finished" in capsys.readouterr().out
    assert launch() == 0
    assert set(starts(tmp_path / "out").values()) == {1}
    manifest = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [point["name"] for point in manifest["points"]] == NAMES
    assert manifest["points"][0]["overrides"] == {"train.seed": 0, "inner.learning_rate": 0.5}
    config = json.loads((tmp_path / "out" / NAMES[3] / "config.json").read_text())
    assert (config["train"]["seed"], config["inner"]["learning_rate"]) == (1, 1.0)


@pytest.mark.parametrize("lost", ("params/_METADATA", "optimizer", "progress/metadata", "progress"))
def test_a_point_whose_last_checkpoint_is_damaged_is_run_again(lost, launch, tmp_path):
    """`train` will find it damaged, and go on from the one before."""
    assert launch("--parallel=4") == 0
    path = tmp_path / "out" / NAMES[1] / "checkpoints" / str(NUM_STEPS) / lost
    if path.is_dir():
        shutil.rmtree(path)
    elif lost.startswith("progress"):
        path.write_text('{"step": 3, "digest": "0123456789abcdef"}')  # sealed, and changed since
    else:
        path.unlink()
    assert launch("--parallel=4") == 0
    assert starts(tmp_path / "out") == dict(zip(NAMES, (1, 2, 1, 1)))


def test_failed_points_are_named_with_their_last_words_and_run_again(launch, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fail").touch()
    assert launch("--parallel=4") == 1
    printed = capsys.readouterr().out
    assert printed.count("failed with exit code 3: no space left") == 4
    (tmp_path / "out" / "fail").unlink()
    assert launch("--parallel=4") == 0
    assert set(starts(tmp_path / "out").values()) == {2}


def test_a_launcher_that_is_not_there_is_said(launch, tmp_path, capsys):
    assert launch(f"--launcher={tmp_path}/no") == 1
    assert capsys.readouterr().out.count("cannot be run: No such file or directory") == 4


def test_another_config_under_the_same_names_is_refused(launch, tmp_path, capsys):
    assert launch("--parallel=4") == 0
    assert launch("--config.model.hidden_size=32") == 2
    assert "config.model.hidden_size = 16, but the sweep now says 32" in capsys.readouterr().err
    assert launch("--config.log.every_steps=1") == 0


def test_a_preempted_run_is_started_again(launch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "preempt").touch()
    assert launch("--parallel=4") == 0
    assert set(starts(tmp_path / "out").values()) == {2}


def start_sweep(config_file, tmp_path, *arguments):
    """launch/sweep.py as a process of its own, whose runs do not end; returns when two of them have begun."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    (out / "hold").touch()
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), f"--config={config_file}", f"--output={out}"]
    command += [f"--launcher={sys.executable} {tmp_path / 'stub.py'}", "--parallel=2", *arguments]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_for(lambda: process.poll() is not None or len(list(out.glob("*/ready"))) == 2)
    assert process.poll() is None
    return process, out


def test_a_kill_in_the_middle_and_a_second_launch(launch, config_file, tmp_path, capsys):
    """SIGKILL of the launcher: its runs go on. One is killed too; the other is waited for, not started twice."""
    launch("--dry_run")  # no more than the stub
    process, out = start_sweep(config_file, tmp_path)
    process.kill()
    process.wait()
    pids = [int((out / name / "starts").read_text().split()[0]) for name in NAMES[:2]]
    os.kill(pids[0], signal.SIGKILL)
    assert not list(out.rglob("*.tmp"))
    capsys.readouterr()
    assert launch("--dry_run") == 0
    states = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  state ")]
    assert states == ["missing", "running", "missing", "missing"]
    (out / "hold").unlink()
    assert launch("--parallel=2") == 0
    assert starts(out) == dict(zip(NAMES, (2, 1, 1, 1)))
    assert [run.name for run in read_runs([out])] == NAMES


# Signals that come together are one: two would end the runs at once, three would kill them.
@pytest.mark.parametrize(("number", "code"), ((signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)))
def test_a_signal_makes_runs_save_and_nothing_is_left(number, code, launch, config_file, tmp_path):
    launch("--dry_run")
    process, out = start_sweep(config_file, tmp_path)
    for each in (number, signal.SIGTERM, number):
        process.send_signal(each)
        time.sleep(0.02)
    assert process.wait() == code
    for name in NAMES[:2]:
        assert (out / name / "checkpoints" / "1").is_dir()
        assert (out / name / "sweep.lock").read_text() == ""
        with pytest.raises(ProcessLookupError):
            os.kill(int((out / name / "starts").read_text().split()[0]), 0)
    assert not (out / NAMES[2] / "starts").exists()


@pytest.mark.parametrize("number", (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP))
def test_on_a_file_system_without_locks_the_file_says_who_lives(number, launch, tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    holder = subprocess.Popen(["sleep", "600"])
    path = tmp_path / "out" / NAMES[1] / "sweep.lock"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"pid": holder.pid, "host": socket.gethostname()}))
    try:
        assert launch("--dry_run") == 0
        states = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  state ")]
        assert states == ["missing", "running", "missing", "missing"]
        assert launch("--submit=true {args}; echo 7") == 1
        assert "3 of 4 points finished or submitted" in capsys.readouterr().out
    finally:
        holder.kill()
        holder.wait()
    for name in set(NAMES) - {NAMES[1]}:
        (tmp_path / "out" / name / "submitted.json").unlink()
    assert launch("--parallel=2") == 0
    assert starts(tmp_path / "out") == dict.fromkeys(NAMES, 1)
    assert path.read_text() == ""


# ----------------------------------------------------------------------------------------------------------- submitting


def test_what_is_submitted_is_not_submitted_again_while_its_job_lives(launch, tmp_path, capsys):
    """A scheduler of two files: `queue` gets a line for each submission, `active` lists the jobs not yet over."""
    queue, active = tmp_path / "queue", tmp_path / "active"
    template = f"echo {{name}} {{args}} >> {queue}; echo Submitted batch job $(wc -l < {queue}) | tee -a {active}"
    arguments = (f"--submit={template}", f"--active=cat {active}")
    assert launch(*arguments) == 0
    lines = queue.read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [f"train --workdir={tmp_path}/out/{name}" for name in NAMES]
    labels = {line.split()[0] for line in lines}
    assert len(labels) == 4
    assert all(len(label) <= 41 and label.replace("-", "").isalnum() and label.islower() for label in labels)
    assert launch(*arguments) == 0
    assert len(queue.read_text().splitlines()) == 4
    write_checkpoint(tmp_path / "out" / NAMES[0])  # finished
    active.write_text("3\n")  # jobs 2 and 4 failed
    assert launch(*arguments) == 0
    assert [line.rsplit("/", 1)[1] for line in queue.read_text().splitlines()[4:]] == [NAMES[1], NAMES[3]]
    active.unlink()
    assert launch(*arguments) == 2
    assert "--active" in capsys.readouterr().err
    assert len(queue.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    "answer, job",
    (
        ("Submitted batch job 41", ("41", "")),
        ("Submitted batch job 41 on cluster blue", ("41", "blue")),
        ("loading modules\nSubmitted batch job 41 on cluster blue\ndone, 3 hours left\n", ("41", "blue")),
        ("41;blue\n", ("41", "blue")),
        ("41", ("41", "")),
        ("", ("", "")),
        ("sbatch: your quota is 7", ("", "")),
        ("jobs are submitted to blue", ("", "")),
    ),
)
def test_the_number_of_a_slurm_job_is_found_in_any_answer(answer, job, sweep):
    assert sweep._job(answer, "sbatch --clusters=blue launch/slurm.sbatch") == job


@pytest.mark.parametrize(
    "answer, job",
    (
        ("jobset.jobset.x-k8s.io/ttt-7f created", "ttt-7f"),
        ("jobset.jobset.x-k8s.io/ttt-7f", "ttt-7f"),
        ("pod/a-b unchanged\n", "a-b"),
        ('Your job 41 ("train") has been submitted', "41"),
        ("Job <41> is submitted to queue <normal>.", "41"),
        ("Submitted batch job 41 on cluster blue", "41"),  # by a wrapper of another name
        ("41.server", "41.server"),
        ("some words\nttt-7f", "ttt-7f"),
    ),
)
def test_the_job_of_other_schedulers_is_found(answer, job, sweep):
    assert sweep._job(answer, "my_wrapper {args}")[0] == job


def tools(directory, monkeypatch, **programs) -> None:
    """Puts programs, shell scripts, on the path."""
    directory.mkdir()
    for name, script in programs.items():
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def test_jobs_of_another_slurm_cluster_are_submitted_once(launch, tmp_path, monkeypatch):
    """`squeue` lists those of another cluster only if told its name."""
    count = f'echo >> {tmp_path}/queue; echo "Submitted batch job $(wc -l < {tmp_path}/queue) on cluster blue"'
    squeue = 'case "$*" in *--clusters=blue*) echo "CLUSTER: blue"; echo 1; echo 2; echo 4;; esac'
    tools(tmp_path / "bin", monkeypatch, sbatch=count, squeue=squeue)
    submitted = lambda: len((tmp_path / "queue").read_text().splitlines())  # noqa: E731
    assert launch("--submit=sbatch") == 0
    assert submitted() == 4
    records = [json.loads((tmp_path / "out" / name / "submitted.json").read_text()) for name in NAMES]
    assert [(record["job"], record["cluster"]) for record in records] == [(str(n), "blue") for n in (1, 2, 3, 4)]
    assert launch("--submit=sbatch") == 0
    assert submitted() == 5  # job 3 is over, and its run is not finished


@pytest.mark.parametrize("answer", ("", "echo it is submitted"))
def test_an_answer_of_sbatch_without_a_number_is_refused_and_never_repeated(
    answer, launch, tmp_path, monkeypatch, capsys
):
    tools(tmp_path / "bin", monkeypatch, sbatch=f"echo >> {tmp_path}/queue; {answer}", squeue="true")
    assert launch("--submit=sbatch --quiet") == 1
    printed = capsys.readouterr().out
    assert printed.count("failed: sbatch answered without a job's number") == 4
    assert f"remove {tmp_path}/out/{NAMES[0]}/submitted.json" in printed
    launch("--submit=sbatch --quiet")
    assert len((tmp_path / "queue").read_text().splitlines()) == 4


def test_a_failed_submission_is_said_and_a_killed_one_is_not_repeated(launch, tmp_path, capsys):
    assert launch("--submit=echo queue is closed >&2; false") == 1
    assert capsys.readouterr().out.count("failed to submit with exit code 1: queue is closed") == 4
    for name in NAMES:
        (tmp_path / "out" / name / "submitted.json").write_text('{"job": "", "time": 0}')
    assert launch(f"--submit=touch {tmp_path}/submitted; echo") == 0
    assert not (tmp_path / "submitted").exists()
    assert f"remove {tmp_path}/out/{NAMES[0]}/submitted.json" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- secrets


def test_no_secret_reaches_the_sweep_directory(launch, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert launch("--config.data.path=gs://me:hunter2@bucket/x", "--config.data.path=y", "--parallel=4") == 0
    assert launch("--config.log.wandb=0123456789abcdef") == 2
    printed = capsys.readouterr()
    everything = printed.out + printed.err
    everything += "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "hunter2" not in everything
    assert "0123456789abcdef" not in everything
    assert os.environ["PATH"] not in everything


# ------------------------------------------------------------------------------------------------------------- for real


@pytest.mark.slow
def test_four_real_runs_killed_in_the_middle_and_reported(config_file, tmp_path):
    writer = TokenWriter(tmp_path / "store", "train", 50)
    writer.append(np.random.default_rng(0).integers(0, 50, 2000))
    writer.close()
    write_attributes(tmp_path / "store", {})
    out = tmp_path / "out"
    sweep = [sys.executable, str(ROOT / "launch" / "sweep.py"), f"--config={config_file}", f"--output={out}"]
    sweep += ["--parallel=2", f"--config.data.path={tmp_path / 'store'}", "--config.log.every_steps=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(sweep, env=environment, start_new_session=True)
    wait_for(lambda: process.poll() is not None or list(out.glob(f"*/checkpoints/{NUM_STEPS}")))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    finished = {path.parents[1] for path in out.glob(f"*/checkpoints/{NUM_STEPS}")}
    assert 1 <= len(finished) < 4
    before = {run: (run / "starts.jsonl").read_text() for run in finished}
    done = subprocess.run(sweep, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 points finished" in done.stdout
    assert {run: (run / "starts.jsonl").read_text() for run in finished} == before
    report = [sys.executable, "-m", "ttt_e2e", "report", f"--workdirs={out}", f"--output={tmp_path / 'report'}"]
    printed = subprocess.run(report, env=environment, capture_output=True, text=True, check=True).stdout
    assert all(name in printed for name in NAMES)
