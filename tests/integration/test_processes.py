"""However many processes make a run, it is the same run."""

import json
import shutil

import numpy as np
import pytest

from tests.integration.conftest import ROOT, digests, evaluations, losses, steps


@pytest.fixture(scope="module")
def alone(runs):
    """The run in a single process."""
    workdir = runs.root / "alone"
    outcome = runs.alone(workdir)
    assert outcome.returncode == 0, outcome.stdout
    return workdir


def assert_close(ours: dict, theirs: dict) -> None:
    """Float32 sums in another order, amplified over the steps."""
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-5)


def test_two_processes_have_the_losses_of_one(undisturbed, alone):
    assert list(losses(undisturbed)) == list(range(1, 13))
    assert_close(losses(undisturbed), losses(alone))
    assert_close(evaluations(undisturbed), evaluations(alone))


def test_saved_by_two_restored_by_one_and_the_reverse(runs, undisturbed, alone):
    for source, resume in ((undisturbed, runs.alone), (alone, runs.launch)):
        workdir = runs.root / f"{source.name}-continued"
        shutil.copytree(source, workdir)
        shutil.rmtree(workdir / "checkpoints" / "12")
        outcome = resume(workdir)
        assert outcome.returncode == 0, outcome.stdout
        assert "resuming from step 9" in outcome.stdout
        assert_close(losses(workdir), losses(alone))
        assert steps(workdir) == [9, 12]


@pytest.mark.slow
@pytest.mark.parametrize("processes, kind", ((2, "fast"), (4, "fast"), (4, "plain")))
def test_more_processes_and_fast_weights(processes, kind, runs):
    one, many = (runs.root / f"{kind}-{name}" for name in (f"one-for-{processes}", processes))
    assert runs.alone(one, kind=kind).returncode == 0
    outcome = runs.launch(many, processes=processes, kind=kind)
    assert outcome.returncode == 0, outcome.stdout
    assert_close(losses(many), losses(one))


@pytest.mark.slow
def test_a_model_axis_across_processes(runs, alone):
    workdir = runs.root / "model-axis"
    outcome = runs.launch(workdir, "--config.mesh.model=2", launcher=("--devices=2",))
    assert outcome.returncode == 0, outcome.stdout
    assert_close(losses(workdir), losses(alone))


@pytest.mark.slow
def test_two_runs_of_two_processes_are_equal_to_the_bit(runs, undisturbed):
    workdir = runs.root / "again"
    assert runs.launch(workdir).returncode == 0
    assert losses(workdir) == losses(undisturbed)
    assert digests(workdir) == digests(undisturbed)


def test_two_processes_evaluate_as_one(runs, alone):
    """Each reads its own sequences; the NLL of every token comes to the first, which writes."""
    found = []
    for name, launcher in (
        ("one", ["-m", "ttt_e2e"]),
        ("two", [str(ROOT / "launch/local.py"), "--num_processes=2", "--"]),
    ):
        output = runs.root / f"evaluated-by-{name}"
        outcome = runs.finish(runs.start([*launcher, "evaluate", f"--workdir={alone}", f"--output={output}"]))
        assert outcome.returncode == 0, outcome.stdout
        found.append((json.loads((output / "metrics.json").read_text()), np.load(output / "token_nll.npy")))
    (metrics_1, nll_1), (metrics_2, nll_2) = found
    assert metrics_1.keys() == metrics_2.keys()
    np.testing.assert_allclose(list(metrics_1.values()), list(metrics_2.values()), rtol=1e-6)
    np.testing.assert_allclose(nll_1, nll_2, atol=1e-5)
    assert nll_1.shape == (metrics_1["num_sequences"], metrics_1["seq_len"])
