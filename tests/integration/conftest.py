"""Runs of real processes on this machine, over CPU collectives, and what is left of them on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ttt_e2e.data.store import TokenWriter, write_attributes
from ttt_e2e.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
BOUND = 600  # seconds within which all ends; machines of tests may be busy


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the tests that start processes, by the fixtures they ask for: runs, sweeps, a Slurm."""
    for item in items:
        if Path(__file__).parent in item.path.parents and {"runs", "launch", "slurm"} & set(item.fixturenames):
            item.add_marker("processes")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Where the tests' runs are made."""
    return Runs(tmp_path_factory.mktemp("integration"))


@pytest.fixture(scope="session")
def undisturbed(runs):
    """The run of two processes that nothing happens to."""
    workdir = runs.root / "undisturbed"
    outcome = runs.launch(workdir)
    assert outcome.returncode == 0, outcome.stdout
    return workdir


class Runs:
    """Starts runs of the tiny config, each in a directory of its own."""

    def __init__(self, root: Path):
        self.root = root
        self.store = root / "tokens"
        random = np.random.default_rng(0)
        for split, num_sequences in (("train", 40), ("val", 6)):
            writer = TokenWriter(self.store, split, 31)
            writer.append(random.integers(1, 31, num_sequences * 32 + 1))
            writer.close()
        write_attributes(self.store, {"bos_id": 1, "vocab_size": 31})
        flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "XLA_FLAGS": " ".join(flags),
            # Restarts compile the same programs again; quick ones, too.
            "JAX_COMPILATION_CACHE_DIR": str(root / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def command(self, workdir, *overrides, kind="plain", store=None) -> list[str]:
        """Of `train`."""
        config = f"--config={ROOT}/tests/integration/tiny.py:{store or self.store},{kind}"
        return ["train", config, f"--workdir={workdir}", *overrides]

    def start(self, arguments: list[str]) -> subprocess.Popen:
        """Starts a Python program in the background."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def finish(self, process: subprocess.Popen) -> subprocess.CompletedProcess:
        """Waits for its end, which must come within the bound."""
        output, _ = process.communicate(timeout=BOUND)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def begin(self, workdir, *overrides, processes=2, launcher=(), **kwargs) -> subprocess.Popen:
        """`train` under launch/local.py, in the background."""
        options = [f"--num_processes={processes}", "--grace=30", *launcher, "--"]
        return self.start([str(ROOT / "launch" / "local.py"), *options, *self.command(workdir, *overrides, **kwargs)])

    def launch(self, workdir, *overrides, **kwargs) -> subprocess.CompletedProcess:
        """`train` under launch/local.py, to its end."""
        return self.finish(self.begin(workdir, *overrides, **kwargs))

    def alone(self, workdir, *overrides, **kwargs) -> subprocess.CompletedProcess:
        """`train` in one process without a launcher, to its end."""
        return self.finish(self.start(["-m", "ttt_e2e", *self.command(workdir, *overrides, **kwargs)]))


def process(launcher: subprocess.Popen, number: int) -> int:
    """Id of a process that a launcher has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        if f"--process_id={number}".encode() in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
            return int(child)
    raise LookupError(f"process {number} does not run")


def wait_for_step(workdir: Path, step: int, launcher: subprocess.Popen) -> None:
    """Returns when the metrics of a step are written."""
    deadline = time.monotonic() + BOUND
    while time.monotonic() < deadline and launcher.poll() is None:
        metrics = workdir / "metrics.jsonl"
        if metrics.exists() and any(line["step"] >= step for line in read_metrics(metrics)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come: {launcher.communicate()[0]}")


def losses(workdir: Path) -> dict[int, float]:
    """{step: loss}; fails where a step stands there twice."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert len(steps) == len(set(steps)), steps
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def evaluations(workdir: Path) -> dict[int, float]:
    """{step: held-out loss}."""
    return {line["step"]: line["eval_loss"] for line in read_metrics(workdir / "metrics.jsonl") if "eval_loss" in line}


def steps(workdir: Path) -> list[int]:
    """Steps that are listed as checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def digests(workdir: Path, step: int = 12) -> dict:
    """Digests of the parameters and the optimizer's state of a step, once the step is found to be what they say."""
    from ttt_e2e.checkpoints.progress import load_progress

    return load_progress(workdir / "checkpoints" / str(step))["arrays"]


def stop(launcher: subprocess.Popen) -> None:
    """Ends a launcher and what it has started, if they still run."""
    if launcher.poll() is None:
        for number in (0, 1):
            try:
                os.kill(process(launcher, number), signal.SIGKILL)
            except (LookupError, ProcessLookupError):
                continue
        launcher.kill()
        launcher.communicate()
