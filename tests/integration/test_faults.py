"""What goes wrong ends in recovery or in one clear line, within a bound, and leaves nothing worse on disk."""

import os
import re
import shutil
import signal

import numpy as np
import pytest

from tests.file_systems import mounted
from tests.integration.conftest import digests, losses, process, steps, stop, wait_for_step
from ttt_e2e.data.store import TokenWriter, write_attributes


def files_of(step_directory) -> list:
    """Its data files, the largest first."""
    files = [file for file in (step_directory / "params").rglob("*") if file.is_file()]
    return sorted(files, key=lambda file: -file.stat().st_size)


def damage(kind: str, step_directory) -> None:
    """Does to a checkpoint what disks do."""
    file = files_of(step_directory)[0]
    content = bytearray(file.read_bytes())
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif kind == "no metadata":
        (step_directory / "params" / "_METADATA").unlink()


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ("flipped", pytest.param("truncated", marks=slow), pytest.param("no metadata", marks=slow))
)
def test_a_damaged_newest_checkpoint_is_skipped_by_all_processes(kind, runs, undisturbed):
    workdir = runs.root / f"damaged-{kind}"
    shutil.copytree(undisturbed, workdir)
    damage(kind, workdir / "checkpoints" / "12")
    outcome = runs.launch(workdir)
    assert outcome.returncode == 0, outcome.stdout
    assert "set aside as" in outcome.stdout and "going back to step 9" in outcome.stdout
    assert (workdir / "checkpoints" / "12.damaged").is_dir()
    assert losses(workdir) == losses(undisturbed)
    assert digests(workdir) == digests(undisturbed)


@slow
def test_a_frozen_peer_ends_the_others_within_the_bound(runs, undisturbed):
    workdir = runs.root / "frozen"
    launcher = runs.begin(workdir, "--heartbeat_timeout=10", "--config.train.num_steps=100000")
    try:
        wait_for_step(workdir, 4, launcher)
        os.kill(process(launcher, 1), signal.SIGSTOP)
        outcome = runs.finish(launcher)
    finally:
        stop(launcher)
    assert outcome.returncode not in (0, 2), outcome.stdout
    assert "local: process 0 ended" in outcome.stdout
    assert 3 in steps(workdir)


@slow
def test_data_that_vanishes_is_one_line(runs):
    store = runs.root / "vanishing"
    shutil.copytree(runs.store, store)
    shutil.rmtree(store / "train" / "c")
    outcome = runs.launch(runs.root / "without-data", store=store)
    assert outcome.returncode == 2, outcome.stdout
    assert "damaged data" in outcome.stdout and "Traceback" not in outcome.stdout


def make_large_store(path):
    """A store of many files, so that a run has read few of them when it has made some steps."""
    random = np.random.default_rng(1)
    for split, num_sequences in (("train", 4000), ("val", 6)):
        writer = TokenWriter(path, split, 31, chunk_tokens=320)
        writer.append(random.integers(1, 31, num_sequences * 32 + 1))
        writer.close()
    write_attributes(path, {"bos_id": 1, "vocab_size": 31})


def lose(kind: str, store) -> None:
    """What happens to the data while a run reads it."""
    for file in (store / "train" / "c").iterdir():
        if kind == "removed":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "kind, processes", (("removed", 1), pytest.param("cut", 1, marks=slow), pytest.param("removed", 2, marks=slow))
)
def test_data_lost_in_the_middle_is_one_line_and_the_run_goes_on_once_it_is_back(kind, processes, runs):
    store, workdir = (runs.root / f"{name}-{kind}-{processes}" for name in ("large-store", "data-lost"))
    make_large_store(store)
    shutil.copytree(store, whole := runs.root / f"{store.name}-whole")
    launcher = runs.begin(workdir, "--config.train.num_steps=100000", store=store, processes=processes)
    try:
        wait_for_step(workdir, 4, launcher)
        lose(kind, store)
        outcome = runs.finish(launcher)
    finally:
        stop(launcher)
    assert outcome.returncode == 2, outcome.stdout
    assert re.search(r"error: .*large-store.*/train: damaged data .*c/\d+", outcome.stdout), outcome.stdout
    assert "Traceback" not in outcome.stdout
    reached = steps(workdir)[-1]
    assert reached >= 3
    shutil.rmtree(store)
    whole.rename(store)
    resumed = runs.launch(workdir, f"--config.train.num_steps={reached + 2}", store=store, processes=processes)
    assert resumed.returncode == 0, resumed.stdout
    assert f"resuming from step {reached} " in resumed.stdout
    assert sorted(losses(workdir)) == list(range(1, reached + 3))


@slow
def test_another_token_store_is_refused(runs, undisturbed):
    workdir = runs.root / "other-data"
    shutil.copytree(undisturbed, workdir)
    outcome = runs.alone(workdir, "--config.data.train_split=val")
    assert outcome.returncode == 2
    assert "fingerprint" in outcome.stdout


@slow
def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_was_saved(runs, undisturbed, tmp_path):
    with mounted(tmp_path, "400k"):
        workdir = tmp_path / "run"
        outcome = runs.launch(workdir, "--config.checkpoint.keep=100", "--config.checkpoint.every_steps=1")
        saved = steps(workdir)
        assert outcome.returncode == 2, outcome.stdout
        assert "could not save a checkpoint" in outcome.stdout
        rescued = runs.root / "rescued"
        shutil.copytree(workdir, rescued)
    assert saved
    outcome = runs.launch(rescued)
    assert outcome.returncode == 0, outcome.stdout
    assert f"resuming from step {saved[-1]} " in outcome.stdout
    assert digests(rescued) == digests(undisturbed)
