"""A tiny run on a token store of bytes, and readers of no model at all."""

import dataclasses
import re
from typing import NamedTuple

import numpy as np
import pytest
from flax import nnx

from ttt_e2e.checkpoints.params import save_params
from ttt_e2e.checkpoints.progress import progress_of
from ttt_e2e.cli import main
from ttt_e2e.config import Config, from_config_dict
from ttt_e2e.data.store import TokenWriter, write_attributes
from ttt_e2e.data.tokenizers import ByteTokenizer
from ttt_e2e.model import Transformer
from ttt_e2e.model.parameters import split
from ttt_e2e.runs.directory import claim, load_config

BOS, T, b = ByteTokenizer.bos_id, 32, 8
DOCUMENT_LENGTHS = (700, 90, 400, 260, 60, 500)  # in tokens, BOS left out
MODEL = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
MODEL |= {"num_attention_heads": 2, "num_fast_blocks": 1, "sliding_window": 8, "initializer_range": 0.3}


def write_store(path, tokenizer=None, lengths=DOCUMENT_LENGTHS):
    """A store whose one split, val, has documents of random words of these lengths."""
    tokenizer, random = tokenizer or ByteTokenizer(), np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghij"), 4)) for _ in range(20)]
    writer = TokenWriter(path, "val", tokenizer.vocab_size)
    for length in lengths:
        text = " ".join(random.choice(words, length)).replace(words[0], "\n")
        writer.append(np.array([tokenizer.bos_id, *tokenizer.encode(text)[:length]]))
    writer.close()
    name = "bytes" if isinstance(tokenizer, ByteTokenizer) else "tokenizer.model"
    write_attributes(path, {"tokenizer": name, "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id})


def make_run(workdir, store, *, seed=0, bos_id=BOS, **model):
    """A run directory with a checkpoint of random parameters, at step 0."""
    sections = {
        "model": MODEL | model,
        "inner": {"mini_batch_size": b, "learning_rate": 0.5},
        "train": {"seq_len": T, "seed": seed},
        "data": {"path": str(store), "bos_id": bos_id},
        "eval": {"batch_size": 2},
        "mesh": {"data": 1},
    }
    config = from_config_dict(sections)
    _, fast, slow = split(Transformer(config.model, nnx.Rngs(seed)))
    claim(workdir, config)
    save_params(workdir / "checkpoints", {"fast": fast, "slow": slow}, progress_of(0, 0, config))
    return workdir


@pytest.fixture(scope="session")
def store_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "store"
    write_store(path)
    return path


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, store_path):
    return make_run(tmp_path_factory.mktemp("runs") / "run", store_path)


@pytest.fixture(scope="session")
def config(workdir) -> Config:
    return load_config(workdir)


@pytest.fixture
def run(capsys):
    """Runs a command; returns its exit code, stdout, and the lines of stderr that are no progress bar."""

    def run_command(*argv):
        code = main(list(map(str, argv)))
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line and "token/s" not in line]

    return run_command


@pytest.fixture
def check_refused(run, workdir, tmp_path):
    """(flags of `evaluate`, pattern of what is said to them), in both of which DIR is an empty directory."""

    def check(flags: str, pattern: str) -> None:
        given = flags.replace("DIR", str(tmp_path)).split()
        code, out, lines = run("evaluate", f"--workdir={workdir}", f"--output={tmp_path / 'out'}", *given)
        assert (code, out) == (2, "")
        assert len(lines) == 1, lines
        assert re.search("^error: .*" + pattern.replace("DIR", str(tmp_path)), lines[0])
        assert list(tmp_path.iterdir()) == []

    return check


class FakeState(NamedTuple):
    tokens_Bn: np.ndarray  # all that was read, the first token included


class FakeReader:
    """What stands in for a reader: predicts as `next_logits(tokens_n) -> logits [V]` says."""

    mini_batch_size = b

    def __init__(self, config, next_logits):
        self.config, self.params = config, {}
        self._next_logits = next_logits

    def start(self, first, batch_size=1):
        return FakeState(np.broadcast_to(np.asarray(first).reshape(-1, 1), (batch_size, 1)))

    def read(self, state, tokens_Bn, *, learn=True, bar=None):
        nlls = [np.zeros((len(tokens_Bn), 0))]
        for i in range(tokens_Bn.shape[1]):
            state, _, nll = self.step(state, lambda _, i=i: tokens_Bn[:, i])
            nlls.append(nll[:, None])
        return state, np.concatenate(nlls, axis=1)

    def step(self, state, choose, *, learn=True):
        logits_BV = np.stack([self._next_logits(tokens) for tokens in state.tokens_Bn])
        chosen = np.asarray(choose(logits_BV))
        nll = np.log(np.exp(logits_BV).sum(axis=1)) - logits_BV[np.arange(len(chosen)), chosen]
        return FakeState(np.concatenate([state.tokens_Bn, chosen[:, None]], axis=1)), chosen, nll


def without_fast_blocks(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_fast_blocks=0))
