"""Loss against the inner learning rate: that of `evaluate`, by one program; and models whose own MLPs are made fast."""

import json
import re

import jax
import numpy as np
import optax
import pytest

from tests.tiny_run import tiny_run
from ttt_e2e.bench import inner_rate
from ttt_e2e.checkpoints.params import save_params
from ttt_e2e.checkpoints.progress import progress_of
from ttt_e2e.cli import main
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation import token_losses
from ttt_e2e.runs.directory import claim
from ttt_e2e.train import steps

pytest.importorskip("matplotlib")

RATES = (0.1, 10.0)
PLAIN = {"num_hidden_layers": 4, "mixer": "window,attention", "num_fast_blocks": 0, "initializer_range": 0.2}


def make_run(workdir, token_store, **sections):
    """A run directory with fresh parameters; returns its path and config."""
    config = tiny_run(token_store, eval={"batch_size": 4, "num_sequences": 6, "every_steps": 0}, **sections)
    claim(workdir, config)
    params = jax.jit(lambda: steps.init_state(config, optax.identity()).params)()
    save_params(workdir / "checkpoints", params, progress_of(0, 0, config))
    return workdir, config


@pytest.fixture(scope="module")
def learner(token_store, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("learner") / "run", token_store, model={"initializer_range": 0.2})


@pytest.fixture(scope="module")
def plain(token_store, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("plain") / "run", token_store, model=PLAIN)


def test_losses_are_those_of_evaluate_by_one_program(learner, tmp_path, monkeypatch, capsys):
    """At rate 0 and at the model's own, through the command line; others differ. Each trace would read once more."""
    workdir, config = learner
    metrics = token_losses.evaluate(config, workdir, tmp_path / "evaluated")
    traced, read_batch = [], steps.read_batch
    monkeypatch.setattr(steps, "read_batch", lambda *args, **options: traced.append(0) or read_batch(*args, **options))
    arguments = [f"--workdir={workdir}", f"--output={tmp_path / 'out'}", "--rates=0.1,10"]
    assert main(["bench", "inner_rate", *arguments]) == 0
    assert len(traced) == 1
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["inner_rate"] for row in rows] == [0, 0.1, config.inner.learning_rate, 10]
    assert rows[0]["loss"] == metrics["loss_without_learning"]
    assert rows[0]["token_loss"] == metrics["token_loss_without_learning"]
    assert (rows[2]["loss"], rows[2]["token_loss"]) == (metrics["loss"], metrics["token_loss"])
    assert len({row["loss"] for row in rows}) == len(rows)
    assert rows[2]["difference"] == metrics["loss"] - metrics["loss_without_learning"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "- The best of these rates is " in text and "- The model's own rate is 0.5." in text
    assert (tmp_path / "out" / inner_rate.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert text.splitlines()[0] in capsys.readouterr().out


def test_a_rate_that_diverges_is_a_row_without_a_loss(learner, tmp_path):
    """Without the clip, which would bound what an inner step changes."""
    workdir, _ = learner
    overrides = ["--config.inner.clip_norm=0", "--config.eval.num_sequences=4"]
    arguments = [f"--workdir={workdir}", f"--output={tmp_path}", "--rates=1e38", *overrides]
    assert main(["bench", "inner_rate", *arguments]) == 0
    *_, last = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert (last["inner_rate"], last["loss"], last["token_loss"], last["difference"]) == (1e38, None, None, None)
    text = (tmp_path / "results.md").read_text()
    assert "diverged" in text and "- The loss is not finite at 1e+38." in text


def test_a_plain_model_learns_by_the_mlps_of_its_last_blocks(plain, tmp_path):
    """At rate 0 it is itself, whichever of its blocks are fast; both mixers of its pattern are among them."""
    workdir, config = plain
    metrics = token_losses.evaluate(config, workdir, tmp_path / "evaluated")
    for number, chosen in ((1, 0), (3, 3)):  # a quarter of the four blocks, and three
        without, learning = inner_rate.run(tmp_path, config, workdir, rates=(0.3,), num_fast_blocks=chosen)
        assert (without["num_fast_blocks"], without["variant"]) == (number, "MLPs made fast")
        np.testing.assert_allclose(without["loss"], metrics["loss"], rtol=1e-6)
        np.testing.assert_allclose(without["token_loss"], metrics["token_loss"], rtol=1e-6)
        assert abs(learning["difference"]) > 1e-3


def test_which_mlps_are_made_fast(token_store):
    """Those of the last blocks, with their norms; the slow ones there are 0."""
    config = tiny_run(token_store, model={"num_hidden_layers": 4, "num_fast_blocks": 0})
    learning = inner_rate._learning_config(config, 3).model
    slow = steps.init_state(config, optax.identity()).params["slow"]
    given = slow["prefix"]
    given["mlp_norm"]["weight"] = np.arange(4 * 16.0).reshape(4, 16)
    made = inner_rate.with_fast_mlps(config.model, learning, {"fast": {}, "slow": slow | {"prefix": given}})
    fast, suffix, prefix = made["fast"]["suffix"]["fast_mlp"], made["slow"]["suffix"], made["slow"]["prefix"]
    for name, weight in given["mlp"].items():
        np.testing.assert_array_equal(fast[name], weight[1:])
        np.testing.assert_array_equal(prefix["mlp"][name], weight[:1])
        assert not suffix["mlp"][name].any()
    np.testing.assert_array_equal(suffix["fast_mlp_norm"]["weight"], given["mlp_norm"]["weight"][1:])
    np.testing.assert_array_equal(suffix["attention"]["wq"], given["attention"]["wq"][1:])


REFUSED = {
    "--rates=0.1,-1": "--rates has -1.0, but it takes finite numbers of at least 0",
    "--rates=nan": "--rates has nan, but",
    "--rates=fast": "--rates=fast: it takes numbers separated by commas",
    "--num_fast_blocks=1": "--num_fast_blocks is 1, but the model has 1 blocks with a fast MLP, which",
    "--num_fast_blocks=-1": "--num_fast_blocks is -1, but it must be at least 1 and at most the model's 2 blocks",
    "--config.inner.mini_batch_size=32": "config.inner.mini_batch_size is 32, the whole sequence",
    "--config.eval.batch_size=4 --config.mesh.data=8": "config.eval.batch_size is 4, but it must be a multiple of 8",
    "--config.data.path=no/store": "no/store: no token store there",
    "--checkpoint=no/run": "checkpoint .*no/run does not exist",
}


@pytest.mark.parametrize("given", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(given, learner, tmp_path, capsys):
    assert main(["bench", "inner_rate", f"--workdir={learner[0]}", f"--output={tmp_path / 'out'}", *given.split()]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line]
    assert re.search("^error: " + REFUSED[given], line)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_needed(tmp_path, learner, capsys):
    config = f"--config={learner[0] / 'config.json'}"
    assert main(["bench", "inner_rate", config, f"--output={tmp_path / 'out'}"]) == 2
    assert "error: --checkpoint is missing" in capsys.readouterr().err


def test_blocks_that_cannot_be_fast_are_named(plain, tmp_path):
    config = tiny_run(plain[1].data.path, model=PLAIN | {"engram": {"blocks": "3", "table_size": 50}})
    with pytest.raises(UserError, match=r"config.model.engram.blocks is '3', but it must be .* 0 to 2"):
        inner_rate.run(tmp_path / "out", config, plain[0])
