"""A step that takes too long is said by all processes while it lasts, and once by process 0 when it has ended."""

import os
import re
import signal
import time

import pytest

from tests.integration.conftest import process, stop, wait_for_step
from ttt_e2e.errors import EXIT_REQUEUE
from ttt_e2e.runs.metrics import read_metrics


@pytest.mark.slow
def test_a_process_that_is_frozen_for_a_while(runs):
    workdir = runs.root / "frozen-for-a-while"
    launcher = runs.begin(workdir, "--config.train.num_steps=100000", "--config.checkpoint.every_steps=0")
    try:
        wait_for_step(workdir, 20, launcher)
        os.kill(process(launcher, 1), signal.SIGSTOP)
        time.sleep(15)  # past the ten seconds under which no step is slow
        frozen_at = max(line["step"] for line in read_metrics(workdir / "metrics.jsonl"))
        os.kill(process(launcher, 1), signal.SIGCONT)
        wait_for_step(workdir, frozen_at + 20, launcher)
        launcher.send_signal(signal.SIGTERM)
        outcome = runs.finish(launcher)
    finally:
        stop(launcher)
    assert outcome.returncode == EXIT_REQUEUE, outcome.stdout
    while_it_lasts = r"^(?:\[0\] )?step (\d+) was 1\d seconds ago, the median is [\d.]+: process 0 has been in compute"
    (said_of,) = {int(step) for step in re.findall(while_it_lasts, outcome.stdout, re.MULTILINE)}
    assert said_of - frozen_at in (0, 1, 2)  # steps are started ahead
    afterwards = r"^(?:\[0\] )?step (\d+) took \d+\.\d seconds, the median is [\d.]+: process \d input"
    assert len(re.findall(afterwards, outcome.stdout, re.MULTILINE)) == 1, outcome.stdout
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if "goodput" in line]
    assert all(0 <= line["goodput"] <= 1 for line in lines)
