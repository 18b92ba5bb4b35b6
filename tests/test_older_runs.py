"""Run directories and saved states of earlier versions are read by this one.

tests/data/before_mixers.tar.gz was written by revision e1fa318, in which each part of the model was one stack of blocks
and a saved state one KV cache: of a model with windows, and of one whose blocks alternate between a window and full
attention, each trained for 4 steps, evaluated, and given a prompt to continue.
"""

import dataclasses
import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from ttt_e2e.config import Config
from ttt_e2e.data.store import TokenStore
from ttt_e2e.evaluation.token_losses import evaluate
from ttt_e2e.inference.generate import load_reader
from ttt_e2e.inference.state import load_state, read_about
from ttt_e2e.runs.directory import load_config
from ttt_e2e.runs.metrics import read_metrics
from ttt_e2e.train.loop import train

ARCHIVE = Path(__file__).parent / "data" / "before_mixers.tar.gz"
BOS, READ = 256, "The License, in a few words, is the following aaaaa"
KINDS = pytest.mark.parametrize("kind", ["window", "mixed"])


@pytest.fixture
def older(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "older", filter="data")
    return tmp_path / "older"


def config_of(older, kind: str) -> Config:
    config = load_config(older / kind / "run")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(older / "tokens")))


@KINDS
def test_a_checkpoint_has_the_losses_that_it_had(kind, older, tmp_path):
    evaluate(config_of(older, kind), older / kind / "run", tmp_path / "evaluation")
    ours, theirs = (
        json.loads((directory / "metrics.json").read_text())
        for directory in (tmp_path / "evaluation", older / kind / "evaluation")
    )
    assert ours["step"] == theirs["step"] == 4
    for name in ("loss", "token_loss", "loss_without_learning"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)


@pytest.mark.parametrize("kind", [pytest.param("window", marks=pytest.mark.slow), "mixed"])
def test_a_run_goes_on(kind, older):
    config, workdir = config_of(older, kind), older / kind / "run"
    before = {line["step"]: line["loss"] for line in read_metrics(workdir / "metrics.jsonl") if "loss" in line}
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=6)), workdir)
    after = {line["step"]: line["loss"] for line in read_metrics(workdir / "metrics.jsonl") if "loss" in line}
    assert list(after) == [1, 2, 3, 4, 5, 6]
    assert {step: after[step] for step in before} == before  # nothing was trained again
    assert max(after[5], after[6]) < before[1]  # with parameters and moments of the optimizer that fit together


@KINDS
def test_a_saved_state_is_what_reading_the_same_gives(kind, older):
    config, state = config_of(older, kind), older / kind / "state"
    reader = load_reader(config, older / kind / "run" / "checkpoints" / "4", 200)
    loaded, position = load_state(state, reader), read_about(state)["position"]
    tokens = np.array([[BOS, *READ.encode()]])[:, : position + 1]
    expected, _ = reader.read(reader.start(tokens[:, 0]), tokens[:, 1:])
    assert position % reader.mini_batch_size  # in the middle of a mini-batch, where most is kept
    loaded, expected = (s._replace(prepared=None) for s in (loaded, expected))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=2e-5), loaded, expected)
    text = TokenStore.open(older / "tokens", "val").stretch(0, 4)[None]
    np.testing.assert_allclose(reader.read(loaded, text)[1], reader.read(expected, text)[1], rtol=1e-4)
