"""Ctrl-C saves and stops the run, wherever it finds Python: also where that cannot raise an exception."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import tiny_run
from ttt_e2e.checkpoints.progress import load_progress
from ttt_e2e.checkpoints.steps import saved_steps
from ttt_e2e.config import to_dict

ROOT = Path(__file__).parents[2]

# A callback of the garbage collector, on the main thread, sends SIGINT once, in a chosen part of the run.
PROGRAM = """
import gc, os, signal, sys, threading
from pathlib import Path
workdir, when = Path(sys.argv[3].removeprefix("--workdir=")), os.environ["WHEN"]

def is_time():
    metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    return {
        "imports": lambda: "jax" in sys.modules and not (workdir / "config.json").exists(),
        "set-up": lambda: (workdir / "starts.jsonl").exists(),
        "steps": lambda: metrics.exists() and metrics.read_text().count("grad_norm") >= 2,
        "save": lambda: checkpoints.exists() and any("tmp" in path.name for path in checkpoints.iterdir()),
    }[when]()

def callback(phase, info):
    if not sent and threading.current_thread() is threading.main_thread() and is_time():
        sent.append(True)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # where Python runs handlers
            pass

sent = []
gc.callbacks.append(callback)
gc.set_threshold(3000)
from ttt_e2e.cli import main
code = main()
assert sent
sys.exit(code)
"""


@pytest.mark.parametrize("when", ("imports", "set-up", "steps", "save"))
def test_ctrl_c_ends_the_run_with_130_and_what_was_done_is_saved(when, token_store, tmp_path):
    sections = {"model": {"num_fast_blocks": 0}, "train": {"num_steps": 20_000}, "eval": {"every_steps": 0}}
    config = tiny_run(token_store, **sections)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", PROGRAM, "train", f"--config={tmp_path}/config.json", f"--workdir={workdir}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WHEN": when}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr and "KeyboardInterrupt" not in result.stderr
    if when == "imports":
        assert result.stderr == "interrupted\n" and not workdir.exists()
    elif when == "set-up":
        assert saved_steps(workdir / "checkpoints") in ([], [2])
    else:
        step = saved_steps(workdir / "checkpoints")[-1]
        assert load_progress(workdir / "checkpoints" / str(step))["step"] == step
        assert f"interrupted: step {step} is saved in" in result.stderr
        assert (workdir / "train.lock").read_text() == ""
