"""Where a run's time went, in its metrics."""

import types

import numpy as np
import pytest

from ttt_e2e.config import from_config_dict
from ttt_e2e.runs.metrics import read_metrics
from ttt_e2e.runs.watchdog import PHASES
from ttt_e2e.train import step_log
from ttt_e2e.train.step_log import StepLog


@pytest.fixture
def clock(monkeypatch):
    """Stands in for the module `time`, and goes on when it is told to."""
    clock = types.SimpleNamespace(now=1000.0)
    clock.time = clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(step_log, "time", clock)
    return clock


def finish(log: StepLog, clock, step: int, *processes: dict) -> None:
    """A step, on which each process spends so many seconds by phase."""
    seconds_PF = np.array([[seconds.get(phase, 0.0) for phase in PHASES] for seconds in processes])
    clock.now += seconds_PF[0].sum()
    log.finish_step(step, {"loss": 1.0}, seconds_PF)


def test_goodput_is_the_share_of_steps_that_count_in_all_the_time_since_the_first_start(clock, tmp_path):
    config = from_config_dict({"log": {"every_steps": 1}, "train": {"num_steps": 100}})
    log = StepLog(config, tmp_path, first_step=0, productive_seconds=0.0, begun=clock.now - 20)
    finish(log, clock, 1, {"compute": 30.0})  # compiles
    finish(log, clock, 2, {"compute": 8.0, "input": 2.0})
    finish(log, clock, 3, {"compute": 10.0, "save": 5.0, "evaluate": 5.0})
    saved = log.productive_seconds
    finish(log, clock, 4, {"compute": 20.0})  # to be lost
    log.close()
    assert saved == 18
    clock.now += 100  # until it is started again
    log = StepLog(config, tmp_path, first_step=3, productive_seconds=saved, begun=980.0)
    finish(log, clock, 4, {"compute": 30.0})
    finish(log, clock, 5, {"compute": 10.0})
    log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    goodput = [0 / 50, 8 / 60, 18 / 80, 18 / 230, 28 / 240]
    assert [line["goodput"] for line in lines] == pytest.approx(goodput)


def test_waiting_for_data_and_the_spread_of_hosts_are_of_all_steps_since_the_last_line(clock, tmp_path):
    config = from_config_dict({"log": {"every_steps": 2}, "train": {"num_steps": 100}})
    log = StepLog(config, tmp_path, first_step=0, productive_seconds=0.0, begun=0.0)
    finish(log, clock, 1, {"compute": 1.0}, {"compute": 1.0})
    finish(log, clock, 2, {"compute": 4.0}, {"compute": 3.0, "input": 1.0})
    finish(log, clock, 3, {"compute": 2.0, "input": 2.0}, {"compute": 1.0, "input": 3.0, "evaluate": 50.0})
    finish(log, clock, 4, {"compute": 4.0}, {"compute": 1.0, "input": 2.0, "save": 1.0})
    log.close()
    by_step = {line["step"]: line for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert by_step[1]["data_wait_share"] == by_step[1]["host_spread_seconds"] == 0
    assert by_step[2]["data_wait_share"] == pytest.approx(1 / 4)  # of process 1, which waits longest
    assert by_step[2]["host_spread_seconds"] == pytest.approx(1)
    assert by_step[4]["data_wait_share"] == pytest.approx((3 + 2) / (4 + 4))
    assert by_step[4]["host_spread_seconds"] == pytest.approx((1 + 3) / 2)


@pytest.mark.parametrize("is_terminal", (False, True))
def test_a_log_file_gets_a_line_for_each_line_of_metrics(is_terminal, clock, tmp_path, monkeypatch, caplog, capsys):
    for module in ("ttt_e2e.progress", "ttt_e2e.train.step_log"):
        monkeypatch.setattr(f"{module}.on_terminal", lambda: is_terminal)
    monkeypatch.setattr(step_log, "peak_flops", lambda: 1e9)
    caplog.set_level("INFO", logger="ttt_e2e")
    config = from_config_dict({"log": {"every_steps": 10}, "train": {"num_steps": 30}})
    log = StepLog(config, tmp_path, first_step=0, productive_seconds=0.0, begun=clock.now)
    monkeypatch.setattr(log, "_flops", 1e9)
    for step in range(1, 26):
        finish(log, clock, step, {"compute": 60.0 if step == 1 else 4.0})
    log.close()
    said = [record.getMessage() for record in caplog.records]
    tokens = config.train.global_batch_size * config.train.seq_len
    if is_terminal:
        assert said == [] and "\r" in capsys.readouterr().err
        return
    assert "\r" not in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 10, 20]
    assert said == [
        f"step 1 of 30: loss 1.0000, {tokens / 60:,.0f} tokens/s, MFU 1.7%, unknown time left",
        f"step 10 of 30: loss 1.0000, {tokens / 4:,.0f} tokens/s, MFU 25.0%, 01:20 left",
        f"step 20 of 30: loss 1.0000, {tokens / 4:,.0f} tokens/s, MFU 25.0%, 00:40 left",
    ]
