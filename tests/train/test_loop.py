"""A run is a function of its config: interrupted or not, on however many devices."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests.tiny_run import T, tiny_run
from ttt_e2e.checkpoints.params import load_params
from ttt_e2e.checkpoints.progress import load_progress
from ttt_e2e.checkpoints.steps import saved_steps
from ttt_e2e.cluster.mesh import with_shardings
from ttt_e2e.config import to_dict
from ttt_e2e.data.store import TokenStore
from ttt_e2e.errors import UserError
from ttt_e2e.kernels.attention import problems
from ttt_e2e.model import abstract_model
from ttt_e2e.runs.metrics import read_metrics
from ttt_e2e.train import loop


def losses(workdir) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(workdir / "metrics.jsonl") if "loss" in line}


def parameters(workdir, config):
    _, abstract = abstract_model(config.model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return load_params(workdir, with_shardings(abstract, device))


def contents(workdir) -> dict:
    """What a run directory holds, but the records of its starts."""
    paths = [path for path in workdir.rglob("*") if path.is_file() and "starts" not in str(path.relative_to(workdir))]
    return {path: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def finished(token_store, tmp_path_factory):
    """An uninterrupted run of six steps."""
    workdir = tmp_path_factory.mktemp("finished")
    config = tiny_run(token_store)
    loop.train(config, workdir)
    return config, workdir


def test_the_run_directory_holds_what_the_contract_says(finished):
    config, workdir = finished
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    wanted = {"loss", "grad_norm", "learning_rate", "inner_learning_rate", "tokens_per_second", "mfu"}
    assert wanted | {"goodput", "data_wait_share", "host_spread_seconds"} <= set(lines[0])
    assert lines[0]["learning_rate"] == 0  # the schedule is counted from 0
    assert lines[0]["inner_learning_rate"] == pytest.approx(0.1 + 0.4 / 3)
    assert json.loads((workdir / "config.json").read_text()) == to_dict(config)
    progress = load_progress(workdir / "checkpoints" / "6")
    assert progress.pop("model") == to_dict(config)["model"]
    assert {"params.fast.suffix.fast_mlp.w1", "params.slow.embedding"} <= set(progress.pop("arrays"))
    assert progress.pop("digest")
    assert progress.pop("data") == TokenStore.open(config.data.path, "train").fingerprint
    assert progress.pop("productive_seconds") > 0
    assert progress == {"step": 6, "next_batch": 6, "seq_len": T, "global_batch_size": 8}


@pytest.mark.parametrize("stop_after", (3, 4))
def test_resuming_changes_nothing_to_the_bit(stop_after, finished, tmp_path, monkeypatch):
    """Killed after `stop_after` steps, the run goes on from its newest checkpoint, that of step 3."""
    config, workdir = finished
    taken = 0

    def batches_until_killed(*args, **kwargs):
        nonlocal taken
        for batch in all_batches(*args, **kwargs):
            if taken == stop_after:
                raise KeyboardInterrupt
            taken += 1
            yield batch

    all_batches = loop.training_batches
    monkeypatch.setattr(loop, "training_batches", batches_until_killed)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path)
    monkeypatch.undo()
    loop.train(config, tmp_path)
    assert losses(tmp_path) == losses(workdir)
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path, config), parameters(workdir, config))
    before, after = (load_progress(tmp_path / "checkpoints" / step)["productive_seconds"] for step in ("3", "6"))
    assert 0 < before < after


def test_a_finished_run_is_left_alone(finished):
    config, workdir = finished
    before = contents(workdir)
    assert loop.train(config, workdir) == {}
    # No step is made with another rate or log, and so they are not those of the run.
    other = dataclasses.replace(config.optimizer, learning_rate=1.0)
    assert loop.train(dataclasses.replace(config, optimizer=other), workdir) == {}
    assert contents(workdir) == before


def test_fewer_steps_than_are_made_are_refused_and_change_nothing(finished):
    config, workdir = finished
    before = contents(workdir)
    fewer = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=5))
    with pytest.raises(UserError, match=r"num_steps is 5, but workdir .* has made 6 steps: set .*=6 or more, or"):
        loop.train(fewer, workdir)
    assert contents(workdir) == before


def test_a_run_of_which_the_last_steps_are_damaged_is_trained_to_its_end_with_the_config_given(finished, tmp_path):
    """The rule is of what can be restored: it is not finished then."""
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "6" / "progress" / "metadata").write_text("{}")
    other = dataclasses.replace(config, log=dataclasses.replace(config.log, every_steps=2))
    assert loop.train(other, tmp_path / "run")["loss"] == losses(workdir)[6]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == to_dict(other)


def test_accumulation_changes_only_rounding(finished, token_store, tmp_path):
    _, workdir = finished
    loop.train(tiny_run(token_store, train={"accumulation_steps": 4}), tmp_path)
    ours, theirs = losses(tmp_path), losses(workdir)
    # Float32 sums in another order, amplified over six steps.
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-5)


def test_init_from_takes_the_parameters_and_starts_at_step_0(finished, token_store, tmp_path):
    config, workdir = finished
    start = tiny_run(token_store, train={"init_from": str(workdir), "num_steps": 1}, optimizer={"warmup_steps": 0})
    start = dataclasses.replace(start, optimizer=dataclasses.replace(start.optimizer, learning_rate=0.0))
    loop.train(start, tmp_path)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        parameters(tmp_path, config),
        parameters(workdir, config),
    )


def test_train_only_leaves_the_other_parameters_alone(finished, token_store, tmp_path):
    config, workdir = finished
    run = tiny_run(token_store, optimizer={"train_only": r"^fast\."}, train={"init_from": str(workdir)})
    loop.train(run, tmp_path)
    before, after = parameters(workdir, config), parameters(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, before["slow"], after["slow"])
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before["fast"], after["fast"])))


def test_train_only_that_matches_nothing_is_refused(token_store, tmp_path):
    with pytest.raises(UserError, match="train_only 'fats' matches no parameter"):
        loop.train(tiny_run(token_store, optimizer={"train_only": "fats"}), tmp_path)


def test_nan_stops_the_run_naming_step_and_metric(finished, token_store, tmp_path, monkeypatch):
    config, _ = finished
    make = loop.make_train_step

    def make_poisoned(*args):
        step = make(*args)

        def poisoned(state, tokens):
            poison = np.nan if int(state.step) == 3 else 1.0
            state, metrics = step(state, tokens)
            return state, metrics | {"grad_norm": metrics["grad_norm"] * poison}

        return poisoned

    monkeypatch.setattr(loop, "make_train_step", make_poisoned)
    with pytest.raises(UserError, match="grad_norm is nan at step 4"):
        loop.train(config, tmp_path)
    assert saved_steps(tmp_path / "checkpoints")[-1] == 3


def test_a_workdir_with_another_model_is_refused_untouched(finished, token_store):
    _, workdir = finished
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match=r"holds a run whose model.hidden_size is 16, but the config says 32"):
        loop.train(tiny_run(token_store, model={"hidden_size": 32}), workdir)
    assert (workdir / "config.json").read_text() == before


def test_resuming_in_other_units_of_position_is_refused(finished, token_store):
    _, workdir = finished
    with pytest.raises(UserError, match=r"whose train.global_batch_size is 8, but the config says 4"):
        loop.train(tiny_run(token_store, train={"global_batch_size": 4}), workdir)


def test_every_start_is_recorded(finished, token_store, tmp_path):
    config, _ = finished
    for _ in range(2):
        loop.train(
            dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=1)), tmp_path, ["--x=1"]
        )
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["overrides"] for start in starts] == [["--x=1"], ["--x=1"]]
    assert starts[0]["jax"] == jax.__version__


def test_the_steps_are_traced_for_the_choice_of_attention(token_store, tmp_path, monkeypatch):
    """What an accelerator measures before the first step: the attention of both steps, as a device computes it."""
    asked = []

    def measure(trace):
        with problems.noting() as noted:
            trace()
        asked.extend(noted)
        raise UserError("seen")

    monkeypatch.setattr(loop.choice, "measure", measure)
    config = tiny_run(token_store)
    with pytest.raises(UserError, match="seen"):
        loop.train(config, tmp_path / "run")
    mini_batch, sequence = config.inner.mini_batch_size, config.train.seq_len
    assert {("any", mini_batch), ("first_order", sequence)} <= {(p.derivatives, p.num_queries) for p in asked}
