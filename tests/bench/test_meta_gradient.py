"""The benchmark of the meta-gradient, at toy sizes: it runs, counts and names what it measured."""

import dataclasses
import json

import pytest

from ttt_e2e.bench import meta_gradient
from ttt_e2e.config import MeshConfig, from_config_dict
from ttt_e2e.errors import UserError

SIZES = {"width": 16, "num_heads": 2, "mlp_width": 24, "num_blocks": 2, "num_fast_blocks": 1, "vocab": 31}
SIZES |= {"mini_batch": 8, "window": 16, "seq_len": 64, "repeats": 1}


def config(**train):
    model = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model |= {"num_attention_heads": 2, "sliding_window": 16, "num_fast_blocks": 1}
    train = {"seq_len": 64, "global_batch_size": 8} | train
    return from_config_dict({"model": model, "inner": {"mini_batch_size": 8}, "train": train, "mesh": {"data": 1}})


def test_rows_are_variants_with_figures_and_ratios(tmp_path):
    sizes = SIZES | {"num_blocks": 1}  # no prefix: programs of half the size
    rows = meta_gradient.run(tmp_path, variants=("plain", "nested_remat", "exact/auto/auto"), **sizes)
    assert rows == json.loads((tmp_path / "results.json").read_text())
    plain, nested, exact = rows
    assert plain["flops_ratio"] == plain["temp_bytes_ratio"] == plain["step_seconds_ratio"] == 1
    assert 1 < exact["flops_ratio"] < nested["flops_ratio"]
    assert min(row["step_seconds"] for row in rows) > 0
    assert exact["seq_len"] == 64 and exact["mesh"] == "1x1"
    assert "exact/auto/auto" in (tmp_path / "results.md").read_text()


def test_abstract_counts_per_device_and_runs_nothing(tmp_path):
    variants = ("exact/store/mini_batch",)
    [alone] = meta_gradient.run(tmp_path, config(), variants=variants, abstract=True)
    divided = dataclasses.replace(config(), mesh=MeshConfig(data=4, model=2))
    [shared] = meta_gradient.run(tmp_path, divided, variants=variants, abstract=True)
    assert "step_seconds" not in shared
    assert shared["mesh"] == "4x2"
    assert 1 / 9 < shared["flops"] / alone["flops"] < 1 / 4  # attention and norms are not divided over `model`
    assert shared["temp_bytes"] < alone["temp_bytes"] / 2


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(UserError, match="exact/store/blocks: legal are plain"):
        meta_gradient.run(tmp_path, variants=("exact/store/blocks",))
    plain = dataclasses.replace(config(), model=dataclasses.replace(config().model, num_fast_blocks=0))
    with pytest.raises(UserError, match="num_fast_blocks is 0"):
        meta_gradient.run(tmp_path, plain)
    assert not (tmp_path / "results.json").exists()
