"""The held-out loss: each process reads its own rows, devices make the sums, and no token's loss comes to a host."""

import dataclasses
import shutil

import jax
import numpy as np
import optax
import pytest

from tests.tiny_run import BOS, VOCABULARY, T, b, tiny_run
from ttt_e2e.checkpoints.params import save_params
from ttt_e2e.checkpoints.progress import progress_of
from ttt_e2e.cluster.mesh import BATCH, make_mesh, shardings
from ttt_e2e.data.masking import is_target
from ttt_e2e.data.store import TokenStore, TokenWriter, write_attributes
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation import token_losses
from ttt_e2e.inner import read_sequence
from ttt_e2e.model import abstract_model
from ttt_e2e.runs.metrics import read_metrics
from ttt_e2e.train import batches, loop, steps
from ttt_e2e.train.policies import for_reading

SEQUENCES, BATCH_SIZE = 6, 4  # the last batch is filled up with two copies


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Held-out text with a BOS in every mini-batch or so, and a mini-batch of nothing else."""
    path = tmp_path_factory.mktemp("held-out") / "tokens"
    random = np.random.default_rng(1)
    tokens = np.where(random.random(SEQUENCES * T + 1) < 0.1, BOS, random.integers(2, VOCABULARY, SEQUENCES * T + 1))
    tokens[1 : b + 1] = BOS
    for split in ("train", "val"):
        writer = TokenWriter(path, split, VOCABULARY)
        writer.append(tokens)
        writer.close()
    write_attributes(path, {"bos_id": BOS, "vocab_size": VOCABULARY})
    return path


def run_config(store, **sections):
    return tiny_run(store, eval={"batch_size": BATCH_SIZE, "num_sequences": 0, "every_steps": 1}, **sections)


class Held:
    """What `held_out_loss` needs, for a model with fresh parameters."""

    def __init__(self, config):
        self.config, self.mesh = config, make_mesh(config.mesh)
        self.graphdef, abstract = abstract_model(config.model)
        placed = shardings(abstract, self.mesh, config.model)
        self.params = jax.jit(lambda: steps.init_state(config, optax.identity()).params, out_shardings=placed)()
        self.eval_step = steps.make_eval_step(config, self.mesh, placed)
        self.store = TokenStore.open(config.data.path, "val")

    def loss(self, **options):
        eval_step, rate = options.pop("eval_step", self.eval_step), self.config.inner.learning_rate

        def evaluate(tokens, num_sequences):
            return eval_step(self.params, tokens, rate, num_sequences)

        return batches.held_out_loss(evaluate, self.store, self.config, self.mesh, **options)


def by_hand(held: Held):
    """(loss, token loss, number of tokens, NLL [sequences, T]): sequence by sequence, summed in float64 by NumPy."""
    config = for_reading(held.config)
    tokens = held.store.sequences(range(SEQUENCES), T)
    options = {"inner": config.inner, "learning_rate": config.inner.learning_rate, "bos_id": BOS}
    read = jax.jit(
        lambda params, tokens: read_sequence(held.graphdef, params["fast"], params["slow"], tokens, **options)
    )
    readings = [read(jax.device_get(held.params), sequence) for sequence in tokens]
    nll, is_target = np.stack([reading.token_nll_T for reading in readings]), tokens[:, 1:] != BOS
    loss = np.mean([reading.loss for reading in readings], dtype=np.float64)
    return loss, nll[is_target].mean(dtype=np.float64), is_target.sum(), nll


@pytest.mark.parametrize("mesh", ({"data": 1}, {"data": 4, "model": 2}))
@pytest.mark.parametrize("num_fast_blocks", (0, 1))
def test_sums_equal_those_made_by_hand(num_fast_blocks, mesh, store):
    held = Held(run_config(store, model={"num_fast_blocks": num_fast_blocks}, mesh=mesh))
    nlls = []
    found = held.loss(take=lambda nll_BT, count: nlls.append((nll_BT, count)))
    loss, token_loss, num_tokens, nll = by_hand(held)
    np.testing.assert_allclose([found.loss, found.token_loss], [loss, token_loss], rtol=1e-6)
    assert (found.num_tokens, found.num_sequences) == (num_tokens, SEQUENCES)
    assert abs(loss - token_loss) > 1e-3  # two means, not one
    np.testing.assert_allclose(np.concatenate([np.asarray(a)[:count] for a, count in nlls]), nll, atol=1e-5)
    assert all(nll_BT.sharding.spec == BATCH for nll_BT, _ in nlls)  # each sequence's where it was read


def test_a_bos_of_0_is_masked_where_it_is_said(store, tmp_path, caplog):
    """As any other BOS is: the same text with the tokens 0 and BOS exchanged counts the same targets."""
    tokens = TokenStore.open(store, "val").sequences(range(SEQUENCES), T)
    exchanged = np.where(tokens == BOS, 0, np.where(tokens == 0, BOS, tokens))
    fields = {"bos_id": 0, "bos_is_zero": True}
    config = run_config(store, data={**fields, "path": str(store)})
    for masked_id, same in ((config.data.masked_id, True), (0, False)):
        is_same = np.array_equal(is_target(exchanged, masked_id), is_target(tokens, BOS))
        assert is_same is same and is_target(exchanged, 0).all()
    writer = TokenWriter(tmp_path / "zero", "val", VOCABULARY)
    writer.append(np.append(exchanged[:, :-1].reshape(-1), exchanged[-1, -1]))
    writer.close()
    write_attributes(tmp_path / "zero", {"bos_id": 0, "vocab_size": VOCABULARY})
    config = run_config(tmp_path / "zero", data={**fields, "path": str(tmp_path / "zero")})
    assert batches.open_store(config, "val").num_tokens == SEQUENCES * T + 1 and not caplog.records
    num_targets = int((tokens[:, 1:] != BOS).sum())
    assert Held(config).loss().num_tokens == num_targets < SEQUENCES * T
    # Without the field none is masked, as before, and a line says so.
    counted = run_config(tmp_path / "zero", data={"bos_id": 0, "path": str(tmp_path / "zero")})
    batches.open_store(counted, "val")
    assert "--config.data.bos_is_zero=true masks it" in caplog.text and counted.data.masked_id == 0


def test_copies_that_fill_up_a_batch_would_be_seen(store):
    held = Held(run_config(store))

    def counts_all(params, tokens, rate, _):
        return held.eval_step(params, tokens, rate, BATCH_SIZE)

    right, wrong = held.loss(), held.loss(eval_step=counts_all)
    assert wrong.num_tokens > right.num_tokens and wrong.loss > 1.2 * right.loss


@pytest.mark.parametrize("rows", ([0, 1], [2, 3]))
def test_a_process_reads_its_own_rows_only(rows, store, monkeypatch):
    """As one of two processes would: what it hands to the devices is all that it has read."""
    held, asked, handed = Held(run_config(store)), [], []
    sequences = held.store.sequences

    def record(indices, *sizes):
        asked.append(np.asarray(indices).tolist())
        return sequences(indices, *sizes)

    monkeypatch.setattr(held.store, "sequences", record, raising=False)
    monkeypatch.setattr(batches, "local_rows", lambda mesh, batch_size: np.array(rows))
    monkeypatch.setattr(batches, "to_device", lambda tokens, mesh, batch_size: handed.append(tokens))
    sums = {"loss": 0.0, "token_nll": 0.0, "num_tokens": 1}
    held.loss(eval_step=lambda *_: (sums, None))
    last = SEQUENCES - 1  # whose copies fill up the last batch
    assert asked == [rows, [min(BATCH_SIZE + row, last) for row in rows]]
    assert [tokens.shape for tokens in handed] == [(2, T + 1)] * 2


class Untouchable:
    """An array that must stay on its devices."""

    def __init__(self, array):
        self._array = array

    def __getattr__(self, name):
        raise AssertionError(f"{name} of the NLL of every token was asked for")


def untouchable(make):
    def made(*args):
        step = make(*args)

        def eval_step(*inputs):
            sums, nll_BT = step(*inputs)
            assert all(x.shape == () for x in jax.tree.leaves(sums))
            return sums, Untouchable(nll_BT)

        return eval_step

    return made


def test_the_loop_fetches_sums_and_the_command_tokens(store, tmp_path, monkeypatch):
    config = run_config(store, train={"num_steps": 1, "global_batch_size": 4}, optimizer={"warmup_steps": 0})
    monkeypatch.setattr(loop, "make_eval_step", untouchable(loop.make_eval_step))
    loop.train(config, tmp_path / "run")
    assert any(line.get("eval_loss", 0) > 0 for line in read_metrics(tmp_path / "run/metrics.jsonl"))
    monkeypatch.setattr(steps, "make_eval_step", untouchable(steps.make_eval_step))
    with pytest.raises((AssertionError, TypeError)):
        token_losses.evaluate(config, tmp_path / "run", tmp_path / "out")


def test_the_command_writes_every_token(store, tmp_path):
    config = run_config(store, mesh={"data": 4})
    held = Held(config)
    save_params(tmp_path / "model", held.params, progress_of(0, 0, config))
    metrics = token_losses.evaluate(config, tmp_path / "model", tmp_path / "out")
    loss, token_loss, num_tokens, nll = by_hand(held)
    np.testing.assert_allclose([metrics["loss"], metrics["token_loss"]], [loss, token_loss], rtol=1e-6)
    assert (metrics["num_tokens"], metrics["num_sequences"], metrics["seq_len"]) == (num_tokens, SEQUENCES, T)
    written = np.load(tmp_path / "out/token_nll.npy")
    assert written.dtype == np.float32
    np.testing.assert_allclose(written, nll, atol=1e-5)
    without = np.load(tmp_path / "out/token_nll_without_learning.npy")
    np.testing.assert_allclose(without[:, :b], written[:, :b], atol=1e-6)
    assert np.abs(without[:, b:] - written[:, b:]).max() > 1e-4


def test_more_sequences_than_there_are_are_those_there_are(store, tmp_path, caplog):
    config = run_config(store, train={"num_steps": 1, "global_batch_size": 4}, optimizer={"warmup_steps": 0})
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, num_sequences=160))
    with caplog.at_level("INFO", "ttt_e2e"):
        loop.train(config, tmp_path / "run")
        said = [record.message for record in caplog.records if "160" in record.message]
        metrics = token_losses.evaluate(config, tmp_path / "run", tmp_path / "out")
    assert len(said) == 1 and "has 6 sequences of 32 tokens" in said[0], said
    assert metrics["num_sequences"] == SEQUENCES == len(np.load(tmp_path / "out/token_nll.npy"))
    losses = [line["eval_loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "eval_loss" in line]
    np.testing.assert_allclose(losses, [metrics["loss"]], rtol=1e-6)


def damage(path) -> None:
    (chunk,) = (path / "val/c").iterdir()
    chunk.write_bytes(chunk.read_bytes()[:-9])


def make_too_large(path) -> None:
    writer = TokenWriter(path / "other", "val", 2 * VOCABULARY)
    writer.append(np.append(np.full(SEQUENCES * T, 2), VOCABULARY))
    writer.close()
    shutil.rmtree(path / "val")
    (path / "other/val").rename(path / "val")


@pytest.mark.parametrize(("spoil", "reason"), ((damage, "damaged data"), (make_too_large, "token id 31 is not below")))
def test_held_out_text_that_cannot_be_read_ends_a_run_before_it_begins(spoil, reason, store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    spoil(tmp_path / "store")
    config = run_config(tmp_path / "store", checkpoint={"every_steps": 0})
    with pytest.raises(UserError, match=f"store/val: {reason}"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
