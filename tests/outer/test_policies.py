"""What the memory of the devices here makes of "auto"."""

import dataclasses
import logging

import pytest

from tests.outer.conftest import tiny_run
from ttt_e2e.config import MeshConfig
from ttt_e2e.outer import policies, sharding
from ttt_e2e.outer.steps import abstract_model


def resolved(token_store, **inner):
    config = tiny_run(token_store, inner=inner)
    mesh = sharding.make_mesh(MeshConfig(data=1))
    return policies.for_training(config, *abstract_model(config), mesh).inner


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
    _, params = abstract_model(tiny_run(token_store))
    one, eight = policies.free_bytes(params, 1), policies.free_bytes(params, 8)
    assert 0 < one < eight


@pytest.mark.parametrize("gradient", ["reference", "first_order"])
def test_other_gradients_take_policies_too(token_store, gradient):
    config = tiny_run(token_store, inner={"gradient": gradient})
    mesh = sharding.make_mesh(MeshConfig(data=1))
    inner = policies.for_training(config, *abstract_model(config), mesh).inner
    assert inner == dataclasses.replace(config.inner, trajectory="store", remat="keep")
