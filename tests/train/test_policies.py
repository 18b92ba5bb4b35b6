"""What the memory of the devices here makes of "auto"."""

import dataclasses
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from tests.tiny_run import tiny_run
from ttt_e2e.cluster.mesh import make_mesh
from ttt_e2e.config import MeshConfig, from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.model import abstract_model
from ttt_e2e.train import policies
from ttt_e2e.train.loop import train
from ttt_e2e.train.steps import take_policies


def resolved(token_store, **inner):
    return take_policies(tiny_run(token_store, inner=inner), make_mesh(MeshConfig(data=1))).config.inner


def test_plentiful_memory_keeps_everything_and_says_so(token_store, caplog):
    caplog.set_level(logging.INFO)
    inner = resolved(token_store)
    assert (inner.trajectory, inner.remat) == ("store", "keep")
    assert "inner.trajectory store, inner.remat keep: estimated" in caplog.text


def test_a_small_budget_is_obeyed_or_found_too_small(token_store, caplog):
    caplog.set_level(logging.INFO)
    inner = resolved(token_store, memory_budget_bytes=1)
    assert "auto" not in (inner.trajectory, inner.remat)
    assert (inner.trajectory, inner.remat) != ("store", "keep")
    assert "nothing smaller is known" in caplog.text


def test_reading_keeps_only_what_changes_numbers(token_store):
    def read(trajectory):
        config = tiny_run(token_store, inner={"trajectory": trajectory})
        return policies.for_reading(config).inner

    assert [read(t).trajectory for t in ("auto", "store", "delta")] == ["store", "store", "delta"]
    assert read("auto").remat == "mini_batch"


def test_state_is_taken_off_the_devices_memory(token_store):
    _, params = abstract_model(tiny_run(token_store).model)
    one, eight = (policies.free_bytes(params, make_mesh(MeshConfig(data=n))) for n in (1, 8))
    assert 0 < one < eight


def test_the_memory_of_a_device_that_is_not_here_is_what_is_known_of_its_kind(token_store):
    _, params = abstract_model(tiny_run(token_store).model)
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    mesh = SimpleNamespace(devices=np.array([[device]]), size=1)
    assert 0.7 * 141e9 < policies.free_bytes(params, mesh) < 141e9


def test_a_device_of_the_model_axis_is_estimated_to_hold_its_part(token_store):
    """And finds room for more than a device that has all matrices."""
    config = tiny_run(token_store)
    budgets = {}
    for model in (1, 2, 4):
        mesh = make_mesh(MeshConfig(data=1, model=model))
        budgets[model] = estimate(config, mesh)
    assert budgets[4] < budgets[2] < budgets[1]


def estimate(config, mesh) -> int:
    """Bytes that "auto" expects a device to hold, by its own log."""
    with_log = []
    handler = logging.Handler()
    handler.emit = lambda record: with_log.append(record)
    policies.logger.addHandler(handler)
    policies.logger.setLevel(logging.INFO)
    try:
        take_policies(config, mesh)
    finally:
        policies.logger.removeHandler(handler)
    return next(record.args[2] for record in with_log if record.msg.startswith("inner.trajectory"))


@pytest.mark.parametrize(("context", "heads", "taken"), ((131_072, 32, True), (2_048, 32, False), (2_048, 30, True)))
def test_the_prefix_divides_what_moves_fewer_bytes(context, heads, taken, caplog):
    """The 3B model over four devices: weights are fetched once, whatever the length; hidden states grow with it."""
    caplog.set_level(logging.INFO)
    model = dict(hidden_size=2560, intermediate_size=5632, num_hidden_layers=32, num_attention_heads=heads, head_dim=80)
    model |= dict(num_fast_blocks=8, sliding_window=8192, vocab_size=128_256, compute_dtype="bfloat16")
    train = {"seq_len": context, "global_batch_size": 2}
    config = from_config_dict({"model": model, "inner": {"mini_batch_size": 1024}, "train": train})
    mesh = make_mesh(MeshConfig(data=2, model=4))
    assert policies.prefix_by_sequence(config, mesh) == taken
    assert "GiB in a step by the sequence" in caplog.text
    forced = "matrices" if taken else "sequence"
    other = dataclasses.replace(config, mesh=MeshConfig(prefix=forced))
    assert policies.prefix_by_sequence(other, mesh) != taken


@pytest.mark.parametrize("gradient", ["reference", "first_order"])
def test_other_gradients_take_policies_too(token_store, gradient):
    config = tiny_run(token_store, inner={"gradient": gradient})
    inner = resolved(token_store, gradient=gradient)
    assert inner == dataclasses.replace(config.inner, trajectory="store", remat="keep")


def test_an_engram_table_that_fits_no_device_is_refused_before_it_is_made(token_store, tmp_path, monkeypatch):
    """Of this model, one that takes 10 % more than a device has, and the one that the message proposes."""
    engram = {"blocks": "0", "num_heads": 2, "head_dim": 3, "compress_tokens": False}
    config = tiny_run(token_store, model={"engram": engram | {"table_size": 40_000}})
    monkeypatch.setattr(policies, "device_bytes", lambda mesh: int(4 * 4 * (4 * 40_000 * 3) / 1.1))
    with pytest.raises(UserError, match=r"table_size is 40000, .* at most about 36\d\d\d on this mesh") as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    config = tiny_run(token_store, model={"engram": engram | {"table_size": 36_000}})
    policies.check_tables(config, make_mesh(config.mesh))
