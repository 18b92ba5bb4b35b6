"""Metrics survive kills and resumes; model FLOPs count what the method needs."""

import sys
import types

import pytest

from ttt_e2e.config import Config, from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.runs.metrics import MetricsWriter, first_not_finite, read_metrics
from ttt_e2e.train.flops import model_flops_per_token


def test_resuming_drops_what_came_after_the_checkpoint_and_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(tmp_path, Config(), resume_step=0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 / step, "mfu": None})
    writer.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')
    writer = MetricsWriter(tmp_path, Config(), resume_step=2)
    writer.write(3, {"loss": float("nan")})
    writer.close()
    assert read_metrics(path) == [
        {"step": 1, "loss": 1.0, "mfu": None},
        {"step": 2, "loss": 0.5, "mfu": None},
        {"step": 3, "loss": None},
    ]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is not readable JSON"):
        read_metrics(path)


def test_first_not_finite():
    assert first_not_finite({"loss": 1.0, "grad_norm": 2.0}) is None
    assert first_not_finite({"loss": 1.0, "grad_norm": float("inf")}) == "grad_norm"


def test_model_flops_of_a_plain_model_are_six_per_parameter_and_the_attention():
    T, D, F, V, L = 64, 32, 80, 50, 3
    model = {"hidden_size": D, "intermediate_size": F, "vocab_size": V, "num_hidden_layers": L}
    config = from_config_dict({"model": model, "inner": {"mini_batch_size": T}, "train": {"seq_len": T}})
    matrices = L * (4 * D * D + 3 * D * F) + D * V
    attention = L * 4 * D * (T + 1) / 2
    assert model_flops_per_token(config) == pytest.approx(6 * matrices + 3 * attention)


def test_a_window_as_long_as_the_sequence_costs_what_full_attention_does():
    def flops(window):
        sections = {"model": {"sliding_window": window}, "inner": {"mini_batch_size": 64}, "train": {"seq_len": 64}}
        return model_flops_per_token(from_config_dict(sections))

    assert flops(64) == flops(0)
    assert flops(8) < flops(0)


def test_tensorboard_gets_a_copy(tmp_path):
    writer = MetricsWriter(tmp_path, from_config_dict({"log": {"tensorboard": True}}), resume_step=0)
    writer.write(1, {"loss": 0.5, "mfu": None})
    writer.close()
    (events,) = (tmp_path / "logs").glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()
    assert b"mfu" not in events.read_bytes()


def test_wandb_gets_a_copy(tmp_path, monkeypatch):
    """Against a stand-in for the module: the real one wants an account."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    stand_in = types.SimpleNamespace(init=lambda **options: calls.append(options["project"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    writer = MetricsWriter(tmp_path, from_config_dict({"log": {"wandb": "reading"}}), resume_step=0)
    writer.write(1, {"loss": 0.5})
    writer.close()
    assert calls == ["reading", (1, {"loss": 0.5}), "end"]


@pytest.mark.parametrize(("field", "value"), (("tensorboard", True), ("wandb", "project")))
def test_an_optional_writer_that_is_not_installed_names_its_extra(field, value, tmp_path, monkeypatch):
    for module in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"config.log.{field} needs the extra"):
        MetricsWriter(tmp_path, from_config_dict({"log": {field: value}}), resume_step=0)
