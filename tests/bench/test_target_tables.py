"""Tables of many results of `bench target`, and what compiles the paper's configurations one after the other."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from ttt_e2e.bench import target_tables
from ttt_e2e.errors import UserError

PATH = Path(__file__).parents[2] / "launch" / "targets.py"


@pytest.fixture(scope="module")
def launcher():
    """launch/targets.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("launch_targets", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(target: str, mesh: str, hours: float = 8.0, fits: bool = True, **others) -> dict:
    """A row as `bench target` writes it."""
    return {
        "variant": "train",
        "target": target,
        "mesh": mesh,
        "batch": 64,
        "accumulation_steps": 1,
        "seq_len": 8192,
        "fits": fits,
        "needed_bytes": 2**30,
        "state_bytes": 2**29,
        "temp_bytes": 2**29,
        "flops": 10**12,
        "useless_share": 0.0,
        "received_bytes": 3 * 2**30,
        "received_bytes_by_axis": {"data": 2**30, "model": 2**31},
        "bound_seconds": 0.5,
        "binds": "links",
        "tokens_per_second_at_bound": 1e6,
        "device_hours_at_bound": hours / 2.5,
        "device_hours_at_40%_of_bound": hours,
    } | others


@pytest.fixture
def directory(tmp_path):
    """Results of two sizes: one that fits from 8 devices on, and one that fits nowhere."""
    rows = {
        "125m-e2e-8k": [
            result("h100:1", "1x1", fits=False),
            result("h100:8", "8x1", 12.0),
            result("h100:16", "16x1", 99.0),
        ],
        "125m-full-8k": [result("h100:8", "8x1", 6.0), result("h200:8", "8x1", 7.0)],
        "3b-e2e-128k": [result("h100:8", "8x1", fits=False), result("h100:64", "16x4", fits=False)],
        "3b-swa-8k": [result("v6e:4x4", "16x1", fits=False, refused="RESOURCE_EXHAUSTED")],
    }
    for config, of in rows.items():
        for row in of:
            path = tmp_path / f"{config}@{row['target'].replace(':', '-')}@{row['mesh']}"
            path.mkdir()
            (path / "results.json").write_text(json.dumps([row]))
    return tmp_path


def test_of_each_accelerator_the_smallest_slice_that_fits_stands_in_the_table(directory):
    rows = {(row["config"], row["target"]): row for row in target_tables.read(directory)}
    assert list(rows) == [
        ("125m-e2e-8k", "h100:8"),
        ("125m-full-8k", "h100:8"),
        ("3b-e2e-128k", "h100:64"),
        ("125m-full-8k", "h200:8"),
        ("3b-swa-8k", "v6e:4x4"),
    ]


def test_models_stand_beside_full_attention_and_beside_the_reproduction(directory):
    pytest.importorskip("matplotlib")
    text = target_tables.write(directory)
    assert (directory / "tables.md").read_text() == text
    assert (directory / "targets.png").stat().st_size > 1000
    assert "| 125m | 8k | h100:8 | h100:8 | 12 | 6 | 2 |" in text
    assert "| 125m-full-8k | 19.1 | 2.8 | 7 | 14.66 |" in text
    assert text.count("| refused |") == 1 and text.count("| no |") == 1


def test_no_results_are_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no results of bench target"):
        target_tables.read(tmp_path)


def test_every_configuration_has_its_ladder(launcher):
    ladders = launcher.ladders()
    names = [ladder[0].config for ladder in ladders]
    assert len(names) == 45 + 2 + 2 * 9 and len(set(names)) == 45
    for case in (case for ladder in ladders for case in ladder):
        batch = launcher.batch_of(case.config)
        assert batch % (case.data * case.accumulation_steps) == 0 and case.model <= 8
        if not case.config.endswith("8k") or case.config.endswith("128k"):
            assert batch == case.data * case.accumulation_steps  # one sequence at a time
    assert launcher.make_case("3b-e2e-128k", "h100:64") == ("3b-e2e-128k", "h100:64", 16, 4, 1)
    assert launcher.make_case("125m-e2e-8k", "h100:8") == ("125m-e2e-8k", "h100:8", 8, 1, 2)
    assert launcher.make_case("125m-e2e-128k", "h100:128") is None  # 16 devices for a sequence


def test_a_ladder_is_climbed_until_a_slice_fits_and_no_further_and_not_twice(launcher, tmp_path, monkeypatch):
    started = []

    def run(command, stdout, **_):
        flags = dict(flag.split("=", 1) for flag in command if "=" in flag)
        started.append(flags["--target"])
        row = result(flags["--target"], "8x1", fits=flags["--target"] == "h100:16")
        Path(flags["--output"], "results.json").write_text(json.dumps([row]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    ladder = [launcher.make_case("125m-e2e-8k", f"h100:{n}") for n in (1, 8, 16, 32)]
    assert launcher.climb(ladder, tmp_path) == ""
    assert started == ["h100:1", "h100:8", "h100:16"]
    assert launcher.climb(ladder, tmp_path) == "" and len(started) == 3  # all have results
    assert launcher.climb(ladder, tmp_path, match="v5p") == "" and len(started) == 3


def test_a_case_without_a_result_is_named_and_tried_again(launcher, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2))
    flags = [f"--output={tmp_path}", "--match=^125m-e2e-8k@h200"]
    assert launcher.main(flags) == 1
    assert (tmp_path / "125m-e2e-8k@h200-8@8x1" / "log.txt").exists()
    monkeypatch.setattr(launcher, "compile_case", lambda case, directory: pytest.fail("tried again"))
    with pytest.raises(pytest.fail.Exception, match="tried again"):
        launcher.main(flags)


def test_the_output_is_asked_for(launcher, capsys):
    assert launcher.main([]) == 2
    assert "--output is missing" in capsys.readouterr().err
