"""A model made from another one is compared with it before the first step; what was lost ends the run, by its name."""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from ttt_e2e.checkpoints.params import load_params
from ttt_e2e.cli import main
from ttt_e2e.cluster.mesh import make_mesh, shardings, with_shardings
from ttt_e2e.config import ModelConfig, from_config_dict
from ttt_e2e.data.store import TokenWriter, write_attributes
from ttt_e2e.errors import UserError
from ttt_e2e.flags import load_config_file, override
from ttt_e2e.model import abstract_model
from ttt_e2e.train.start_check import Comparison, _cause, check_start

pytest.importorskip("safetensors")

DATA = Path(__file__).parents[1] / "data" / "huggingface"
ADAPT = Path(__file__).parents[2] / "configs" / "adapt.py"
V, T = 96, 32
ADDED = ("--window=8", "--attention_sinks=2", "--num_fast_blocks=1", "--fast_intermediate_size=32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with the runs `base`, and `start`, which has windows and fast MLPs, and a token store."""
    directory = tmp_path_factory.mktemp("adapt")
    for name, added in (("base", ()), ("start", ADDED)):
        arguments = [f"--checkpoint={DATA / 'llama2_tied_mha' / 'model'}", f"--output={directory / name}", *added]
        assert main(["import", "--source=huggingface", *arguments]) == 0
    for split, count in (("train", 8), ("val", 3)):
        writer = TokenWriter(directory / "store", split, V)
        writer.append(np.random.default_rng(0).integers(1, V, count * T + 1))
        writer.close()
    write_attributes(directory / "store", {"vocab_size": V})
    return directory


def flags(runs, **more) -> list[str]:
    fields = {"data.path": runs / "store", "train.seq_len": T, "train.global_batch_size": 2, "train.num_steps": 1}
    fields |= {"inner.mini_batch_size": 4, "eval.num_sequences": 3, "eval.batch_size": 1, "mesh.data": 1}
    fields |= {"optimizer.warmup_steps": 0, "data.bos_id": 0, "data.tokenizer": ""} | more
    return [f"--config.{name}={value}" for name, value in fields.items()]


def config_of(runs, *overrides):
    spec = f"{ADAPT}:{runs / 'start'},{runs / 'base'}"
    return override(load_config_file(spec), [*flags(runs), *overrides])


def test_a_start_that_lost_nothing_is_trained(runs, tmp_path, caplog):
    """Both lengths are compared, the longer one with the base under the same window and sinks."""
    arguments = [f"--config={ADAPT}:{runs / 'start'},{runs / 'base'}", f"--workdir={tmp_path / 'run'}"]
    with caplog.at_level(logging.INFO, "ttt_e2e"):
        assert main(["train", *arguments, *flags(runs)]) == 0
    short, long = [line for line in caplog.messages if line.startswith("before the first step")]
    assert "sequences of 8 tokens" in short and "that of the base " in short
    assert f"sequences of {T} tokens" in long and "the base with the same window" in long
    losses = [float(word) for word in long.replace(",", "").split() if "." in word]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["optimizer"]["decay_steps"] == 1 and config["inner"]["mini_batch_size"] == 4


def test_what_the_config_has_otherwise_is_named_and_nothing_is_trained(runs, tmp_path, capsys):
    arguments = [f"--config={ADAPT}:{runs / 'start'},{runs / 'base'}", f"--workdir={tmp_path / 'run'}"]
    assert main(["train", *arguments, *flags(runs, **{"model.rms_norm_eps": 3})]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "config.model.rms_norm_eps is 3.0, but that of the base is 1e-05" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("inner steps", "without inner steps it is .*, so these do the harm"),
        ("a new MLP", "config.train.init_from has other parameters than this base|does not have the parameters"),
    ],
)
def test_other_losses_are_noticed_by_their_cause(change, message, runs):
    config = config_of(runs, "--config.inner.learning_rate=100", "--config.inner.clip_norm=0")
    mesh, abstract = make_mesh(config.mesh), abstract_model(config.model)[1]
    params = load_params(runs / "start", with_shardings(abstract, shardings(abstract, mesh, config.model)))
    if change == "inner steps":
        suffix = params["slow"]["suffix"]
        suffix["fast_mlp_scale"] = suffix["fast_mlp_scale"] * 0 + 1
    else:
        mlp = params["slow"]["prefix"]["mlp"]
        mlp["w2"] = 0.3 * jax.random.normal(jax.random.key(0), mlp["w2"].shape)
    with pytest.raises(UserError, match=message):
        check_start(config, params, mesh)


def test_the_likely_cause_is_by_what_the_losses_and_configs_show():
    ours, theirs = ModelConfig(vocab_size=1000), ModelConfig(vocab_size=1000, rope_theta=1e4)
    found = Comparison(8, base=2.0, ours=6.8, without_learning=6.8, base_name="the base")
    assert "rope_theta is 500000.0, but that of the base is 10000.0" in _cause(found, ours, theirs)
    assert "ln(vocab_size) is 6.91" in _cause(found, ours, ours)
    assert "other parameters" in _cause(found._replace(ours=3.0, without_learning=3.0), ours, ours)
    assert "without inner steps it is 2.0100" in _cause(found._replace(without_learning=2.01), ours, theirs)
    added = dataclasses.replace(ours, sliding_window=8, num_fast_blocks=1)
    assert "other parameters" in _cause(found._replace(ours=3.0, without_learning=3.0), added, ours)


def test_a_config_without_both_runs_is_refused(runs):
    with pytest.raises(UserError, match=r"configs/adapt.py takes START,BASE, two runs .*, not 'runs/start'"):
        load_config_file(f"{ADAPT}:runs/start")
    with pytest.raises(UserError, match="does not exist"):
        load_config_file(f"{ADAPT}:absent,absent")


def test_plain_fine_tuning_takes_no_mini_batches(runs):
    config = from_config_dict(load_config_file(f"{ADAPT}:{runs / 'base'},{runs / 'base'}"))
    assert config.inner.mini_batch_size == config.train.seq_len
