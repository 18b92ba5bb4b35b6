"""A signal to one process stops all of them at one step, which is saved; what goes on from there is the same run."""

import os
import signal

import numpy as np
import pytest

from tests.integration.conftest import digests, evaluations, losses, process, steps, stop, wait_for_step
from ttt_e2e.data.store import TokenWriter, write_attributes


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


@pytest.mark.slow
def test_a_signal_in_an_evaluation_ends_it_in_all_processes_and_it_is_made_up_for(runs):
    """One of hundreds of batches, so that the signal falls into it."""
    store, workdir = runs.root / "many-held-out", runs.root / "preempted-in-evaluation"
    random = np.random.default_rng(0)
    for split, num_sequences in (("train", 40), ("val", 4000)):
        writer = TokenWriter(store, split, 31)
        writer.append(random.integers(1, 31, num_sequences * 32 + 1))
        writer.close()
    write_attributes(store, {"bos_id": 1, "vocab_size": 31})
    overrides = ("--config.eval.num_sequences=4000", "--config.train.num_steps=7", "--config.checkpoint.every_steps=0")
    launcher = runs.begin(workdir, *overrides, store=store)
    try:
        wait_for_step(workdir, 6, launcher)
        os.kill(process(launcher, 1), signal.SIGTERM)
        outcome = runs.finish(launcher)
    finally:
        stop(launcher)
    assert outcome.returncode == 75, outcome.stdout
    assert steps(workdir) == [6] and evaluations(workdir) == {}
    resumed = runs.launch(workdir, *overrides, store=store)
    assert resumed.returncode == 0, resumed.stdout
    assert sorted(evaluations(workdir)) == [6, 7]
    assert sorted(losses(workdir)) == list(range(1, 8))
