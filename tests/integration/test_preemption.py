"""A signal to one process stops all of them at one step, which is saved; what goes on from there is the same run."""

import os
import signal

import pytest

from tests.integration.conftest import digests, evaluations, losses, process, steps, stop, wait_for_step


@pytest.mark.parametrize("number, name", ((1, "SIGTERM"), pytest.param(0, "SIGUSR1", marks=pytest.mark.slow)))
def test_a_signal_to_one_of_two_saves_and_asks_for_another_start(number, name, runs, undisturbed):
    workdir = runs.root / f"preempted-{name}"
    # Nothing but the signal makes it save before the end.
    overrides = ("--config.checkpoint.every_steps=0", "--config.train.num_steps=12")
    launcher = runs.begin(workdir, *overrides)
    try:
        wait_for_step(workdir, 1, launcher)
        os.kill(process(launcher, number), signal.Signals[name])
        outcome = runs.finish(launcher)
    finally:
        stop(launcher)
    assert outcome.returncode == 75, outcome.stdout
    (step,) = steps(workdir)
    assert 1 <= step < 12
    assert outcome.stdout.count(f"preempted: step {step} is saved") == 2
    resumed = runs.launch(workdir, *overrides)
    assert resumed.returncode == 0, resumed.stdout
    assert f"resuming from step {step} " in resumed.stdout
    assert losses(workdir) == losses(undisturbed)
    assert evaluations(workdir) == evaluations(undisturbed)
    assert digests(workdir) == digests(undisturbed)
