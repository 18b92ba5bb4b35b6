"""A signal during an evaluation ends it at the next batch; it is owed, and made up for when the run is resumed."""

import os
import signal
from contextlib import contextmanager

import pytest

from tests.tiny_run import tiny_run
from ttt_e2e.checkpoints.progress import load_progress
from ttt_e2e.cluster.signals import watch_for_preemption
from ttt_e2e.errors import PreemptedError
from ttt_e2e.runs.metrics import read_metrics
from ttt_e2e.train import loop

BATCHES = 3  # of an evaluation


@pytest.fixture(scope="module")
def config(token_store):
    """Two steps with an evaluation after each; nothing but a signal saves after the first."""
    sections = {"model": {"num_fast_blocks": 0}, "train": {"num_steps": 2}, "checkpoint": {"every_steps": 0}}
    sections["optimizer"] = {"warmup_steps": 1}
    return tiny_run(token_store, **sections, eval={"every_steps": 1, "batch_size": 2, "num_sequences": 2 * BATCHES})


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    loop.train(config, workdir)
    assert list(of(workdir, "eval_loss")) == [1, 2]
    return workdir


def of(workdir, metric: str) -> dict[int, float]:
    """{step: value}, in the order in which they were written."""
    return {line["step"]: line[metric] for line in read_metrics(workdir / "metrics.jsonl") if metric in line}


def arrays(workdir) -> dict:
    return load_progress(workdir / "checkpoints" / "2")["arrays"]


class Signals:
    """Makes runs send themselves SIGTERM."""

    def __init__(self, monkeypatch):
        self.batches = 0  # evaluated since `in_evaluation`
        self._batch = 0
        self._preemption = None
        monkeypatch.setattr(loop, "watch_for_preemption", self._watch)
        monkeypatch.setattr(loop, "make_eval_step", lambda *args: self._count(make_eval_step(*args)))

    def in_evaluation(self, batch: int) -> None:
        """At a batch of the evaluations, counted from 1; 0 = never."""
        self.batches, self._batch = 0, batch

    def send(self) -> None:
        """Returns when it has been received."""
        os.kill(os.getpid(), signal.SIGTERM)
        assert self._preemption.requested.wait(60)

    @contextmanager
    def _watch(self):
        with watch_for_preemption() as self._preemption:
            yield self._preemption

    def _count(self, eval_step):
        def counted(*inputs):
            self.batches += 1
            if self.batches == self._batch:
                self.send()
            return eval_step(*inputs)

        return counted


make_eval_step = loop.make_eval_step


@pytest.fixture
def signals(monkeypatch):
    return Signals(monkeypatch)


@pytest.mark.parametrize("batch, step", ((2, 1), (BATCHES + 1, 2)))
def test_an_evaluation_that_was_cut_short_is_made_up_for(batch, step, config, undisturbed, signals, tmp_path):
    signals.in_evaluation(batch)
    with pytest.raises(PreemptedError, match=f"step {step} is saved"):
        loop.train(config, tmp_path)
    assert signals.batches == batch  # it was asked after that batch, and read no more
    assert load_progress(tmp_path / "checkpoints" / str(step))["owes_evaluation"] is True
    assert list(of(tmp_path, "eval_loss")) == list(range(1, step))

    # Preempted again in the one that is owed: it stays so, and nothing is trained before it.
    signals.in_evaluation(1)
    with pytest.raises(PreemptedError, match=f"step {step} is saved"):
        loop.train(config, tmp_path)
    assert max(of(tmp_path, "loss")) == step
    assert list(of(tmp_path, "eval_loss")) == list(range(1, step))

    signals.in_evaluation(0)
    loop.train(config, tmp_path)
    assert of(tmp_path, "eval_loss") == of(undisturbed, "eval_loss")
    assert of(tmp_path, "loss") == of(undisturbed, "loss")
    assert arrays(tmp_path) == arrays(undisturbed)


def test_a_signal_while_it_trains_leaves_the_evaluation_that_is_due_owed(
    config, undisturbed, signals, monkeypatch, tmp_path
):
    """Between the step and its evaluation: nothing is read, and all is made up for."""
    make_train_step = loop.make_train_step

    def make(*args):
        step = make_train_step(*args)

        def signalled(state, tokens):
            signals.send()
            return step(state, tokens)

        return signalled

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", make)
        with pytest.raises(PreemptedError, match="step 1 is saved"):
            loop.train(config, tmp_path)
    assert signals.batches == 0
    loop.train(config, tmp_path)
    assert of(tmp_path, "eval_loss") == of(undisturbed, "eval_loss")
    assert arrays(tmp_path) == arrays(undisturbed)
