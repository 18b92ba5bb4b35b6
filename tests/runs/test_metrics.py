"""Metrics survive kills and resumes; model FLOPs count what the method needs."""

import struct
import sys
import types
from typing import ClassVar

import pytest

from ttt_e2e.config import Config, from_config_dict, to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.runs import metrics
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


class FakeWriter:
    """What is used of tensorboardX, and what TensorBoard shows of it: of a step that is purged, nothing of before."""

    shown: ClassVar[list[tuple]] = []

    def __init__(self, logdir, purge_step):
        FakeWriter.shown = [(name, step) for name, step in self.shown if step < purge_step]

    def add_scalar(self, name, value, step):
        self.shown.append((name, step))

    def close(self):
        pass


def start(workdir, config: Config, resume_step: int, *steps: int) -> None:
    """A start of a run, which goes on from one step and makes these."""
    workdir.mkdir(exist_ok=True)
    writer = MetricsWriter(workdir, config, resume_step)
    for step in steps:
        writer.write(step, {"loss": 1.0 / step})
        if step % 2 == 0:
            writer.write(step, {"eval_loss": 1.0 / step})
    writer.close()


# Killed after step 3 with step 1 saved; before that, with none.
STARTS = ((0, (1, 2)), (0, (1, 2, 3)), (1, (2, 3, 4)))
SHOWN = [("loss", 1), ("loss", 2), ("eval_loss", 2), ("loss", 3), ("loss", 4), ("eval_loss", 4)]


def test_tensorboard_shows_each_step_once_however_often_the_run_was_started(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=FakeWriter))
    monkeypatch.setattr(FakeWriter, "shown", [])
    for resume_step, steps in STARTS:
        start(tmp_path, from_config_dict({"log": {"tensorboard": True}}), resume_step, *steps)
    assert FakeWriter.shown == SHOWN


def test_tensorboards_files_say_what_to_purge(tmp_path):
    """As TensorBoard reads them: a log that starts at a step replaces what the files before it have from there on."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    shown = []
    for number, (resume_step, steps) in enumerate(STARTS):
        start(tmp_path / str(number), from_config_dict({"log": {"tensorboard": True}}), resume_step, *steps)
        (file,) = (tmp_path / str(number) / "logs").glob("events.out.tfevents.*")
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])  # a record: size, its checksum, the event, its checksum
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.HasField("session_log"):
                shown = [(name, step) for name, step in shown if step < event.step]
            shown += [(value.tag, event.step) for value in event.summary.value]
    assert shown == SHOWN


class FakeRuns:
    """What is used of wandb: runs by id, whose steps must go up."""

    def __init__(self):
        self.runs = {}

    def init(self, *, project, dir, name, id, resume, config, allow_val_change):
        assert resume == "allow"
        run = self.runs.setdefault(id, types.SimpleNamespace(project=project, name=name, lines=[], finished=0))
        assert allow_val_change or getattr(run, "config", config) == config
        run.config = config
        run.finish = lambda: setattr(run, "finished", run.finished + 1)
        run.log = lambda values, step: run.lines.append((step, values)) if step >= self._last(run) else None
        return run

    def _last(self, run) -> int:
        return run.lines[-1][0] if run.lines else 0


def test_every_start_is_of_one_run_at_wandb_which_has_the_config(tmp_path, monkeypatch):
    fake = FakeRuns()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    configs = [from_config_dict({"log": {"wandb": "reading"}, "train": {"num_steps": n}}) for n in (20, 20, 30)]
    for config, (resume_step, steps) in zip(configs, STARTS):
        start(tmp_path / "run", config, resume_step, *steps)
    (run,) = fake.runs.values()
    assert (run.project, run.name, run.finished) == ("reading", "run", 3)
    assert run.config == to_dict(configs[-1])
    assert sorted({step for step, _ in run.lines}) == [1, 2, 3, 4]
    start(tmp_path / "other", configs[0], 0, 1)
    assert len(fake.runs) == 2


@pytest.mark.parametrize("damage", (b"", b"\xff", b"a/b", b"../x\n"))
def test_a_damaged_id_of_wandb_is_replaced(damage, tmp_path):
    first = metrics._wandb_id(tmp_path)
    assert metrics._wandb_id(tmp_path) == first
    (tmp_path / "logs" / "wandb_id").write_bytes(damage)
    second = metrics._wandb_id(tmp_path)
    assert second != first and metrics._wandb_id(tmp_path) == second


def test_wandb_itself_takes_what_it_is_given(tmp_path, monkeypatch):
    """Without its server, by files."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for resume_step, steps in STARTS[:2]:
        start(tmp_path, from_config_dict({"log": {"wandb": "reading"}}), resume_step, *steps)
    stored = (tmp_path / "logs" / "wandb_id").read_text().strip()
    names = {path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert names == {stored}


@pytest.mark.parametrize(("field", "value"), (("tensorboard", True), ("wandb", "project")))
def test_an_optional_writer_that_is_not_installed_names_its_extra(field, value, tmp_path, monkeypatch):
    for module in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"config.log.{field} needs the extra"):
        MetricsWriter(tmp_path, from_config_dict({"log": {field: value}}), resume_step=0)
