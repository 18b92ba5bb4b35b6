"""Reports on synthetic run directories."""

import dataclasses
import json
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest

from ttt_e2e.config import default_config, from_config_dict, to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.base import evaluations
from ttt_e2e.evaluation.plots import colors_of, costs_figure
from ttt_e2e.evaluation.report import format_table, write_report
from ttt_e2e.evaluation.runs import read_runs
from ttt_e2e.figures import drawable, fonts_for

T, b, k = 1024, 64, 128
VOID = {"meta", "img", "link", "br"}


def make_run(workdir, *, kind="e2e", evaluated=True, floor=1.3, steps=200):
    """A run directory with curves of a plausible shape; learning lowers the loss more, the more has been read."""
    rng = np.random.default_rng(len(kind))
    config = default_config()
    config.train.seq_len, config.train.num_steps, config.optimizer.warmup_steps = T, steps, 1
    config.inner.mini_batch_size = b if kind == "e2e" else T
    config.model.sliding_window = 0 if kind == "full" else k
    config.model.num_fast_blocks = 1 if kind == "e2e" else 0
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(to_dict(from_config_dict(config))))
    lines = []
    for step in range(1, steps + 1):
        loss = floor + 4 * np.exp(-step / 15) + 1 / (1 + step / 40) + rng.normal(0, 0.05)
        speed = {"tokens_per_second": rng.normal(2e4, 500), "model_flops_per_second": 1e10, "mfu": None}
        rates = {"learning_rate": 1e-3, "inner_learning_rate": 1.0}
        lines.append({"step": step, "loss": loss, "grad_norm": rng.lognormal(0, 0.2), **rates, **speed})
        if step % 50 == 0:
            lines.append({"step": step, "eval_loss": loss + 0.1, "eval_token_loss": loss + 0.1})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        evaluate(workdir, kind, floor, steps, rng)
    return workdir


def evaluate(workdir, kind, floor, steps, rng):
    folder = workdir / "evaluation"
    folder.mkdir()
    position = np.arange(T)
    text = rng.normal(0, 0.7, (16, T))
    forgetting = floor + 2 / np.sqrt(1 + np.minimum(position, T if kind == "full" else k))
    learned = 0.15 * np.log1p(position / k) if kind == "e2e" else 0
    metrics = {"step": steps, "num_tokens": 16 * T - 3, "num_sequences": 16, "seq_len": T}
    for suffix, nll in (("", forgetting - learned), ("_without_learning", forgetting + 0.05)):
        if suffix and kind != "e2e":
            continue
        nll = (nll + text).astype(np.float32)
        np.save(folder / f"token_nll{suffix}.npy", nll)
        metrics |= {f"loss{suffix}": float(nll.mean()), f"token_loss{suffix}": float(nll.mean()) + 0.001}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def evaluate_long_contexts(workdir, lengths=(512, 1024, 2048), tasks=(1, 3), learns=True, stretches=5):
    """Results such as `evaluate` writes; of one stretch, there are no standard errors."""
    folder = workdir / "evaluation"
    folder.mkdir(exist_ok=True)
    entries = []
    for i, length in enumerate(lengths):
        entry = {"length": length}
        for suffix in ("", "_without_learning") if learns else ("",):
            error = 0.1 if stretches > 1 else None
            entry |= {f"loss{suffix}": 3 - i / 4, f"standard_error{suffix}": error}
            entry |= {f"difference{suffix}": -i / 4, f"difference_standard_error{suffix}": error}
        entries.append(entry)
    contexts = {"step": 9, "lengths": entries, "scored_tokens": 512, "num_stretches": stretches, "num_targets": 2500}
    means = {"exact_match": 0.25, "recall_gain": 0.5, "value_gain": -0.125, "nll": 2.0, "nll_control": 2.5}
    grid = {
        "lengths": list(lengths),
        "depths": [0, 50, 100],
        "samples": 4,
        "tasks": [{"task": t} | means for t in tasks],
    }
    cells = [{"task": t, "length": n, "depth": d} | means for t in tasks for n in lengths for d in grid["depths"]]
    judged = {"num_bytes": 90, "judge_num_tokens": 50, "judge_nll_per_token": 2.5, "judge_nll_per_byte": 1.25}
    generated = {"num_tokens": 50, "own_nll_per_token": None, **judged}
    generation = {"judge": "runs/<judge>", "num_samples": 3, "prompt_tokens": 32, "generated": generated}
    generation |= {"reference": judged | {"judge_nll_per_token": 2.375}, "about": {"step": 9}}
    results = {"context_lengths": contexts, "needle": grid | {"cells": cells}, "generation": generation}
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return workdir


class Balanced(HTMLParser):
    """Checks that every element is closed, and keeps what the page shows as text."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    assert page.startswith("<!DOCTYPE html>")
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    return parser


def test_models_with_engram_and_its_control_are_told_apart(tmp_path):
    """Its tokens that are alike are no parameters: W_k, W_v, three norms, the convolution, and two tables."""
    fields = {"blocks": "1", "table_size": 5, "num_heads": 1, "head_dim": 3}
    engrams = {"without": {}, "with": fields, "control": fields | {"one_row": True}}
    for name, engram in engrams.items():
        path = make_run(tmp_path / name, kind="window", evaluated=False) / "config.json"
        config = json.loads(path.read_text())
        config["model"]["engram"] = engram
        path.write_text(json.dumps(config))
    rows = write_report([tmp_path / name for name in engrams], tmp_path / "out")["rows"]
    described = [row["model"].removeprefix(rows[0]["model"]) for row in rows]
    assert described == ["", ", engram in 1", ", engram of one row in 1"]
    numbers, D = [row["num_parameters"] for row in rows], config["model"]["hidden_size"]
    branch = 2 * 6 * D + 3 * D + 4 * D
    assert [number - numbers[0] for number in numbers[1:]] == [branch + 64 * 3, branch + 2 * 3]


def test_report_on_several_runs(tmp_path):
    workdirs = [make_run(tmp_path / kind, kind=kind) for kind in ("e2e", "window", "full")]
    summary = write_report(workdirs, tmp_path / "out" / "report")
    names = ["loss_by_position.png", "models.png", "report.html", "report.json", "training.png"]
    assert sorted(path.name for path in (tmp_path / "out" / "report").iterdir()) == names
    for name in ("training", "loss_by_position", "models"):
        with open(summary["files"][name], "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert json.loads((tmp_path / "out/report/report.json").read_text()) == summary["rows"]
    assert [row["kind"] for row in summary["rows"]] == ["e2e", "window", "full"]

    page = parse((tmp_path / "out/report/report.html").read_text())
    assert len(page.sources) == 3 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    text = " ".join(page.text)
    for row in summary["rows"]:
        assert row["run"] in text and f"{row['loss']:.4f}" in text
    assert "not learning" in text and '"sliding_window": 128' in text


def test_rows_are_means_over_the_parts_of_the_context(tmp_path):
    workdir = make_run(tmp_path / "run")
    (row,) = write_report([workdir], tmp_path / "report")["rows"]
    nll = np.load(workdir / "evaluation/token_nll.npy").astype(float)
    without = np.load(workdir / "evaluation/token_nll_without_learning.npy").astype(float)
    parts = {"first window": (0, k), "second window": (k, 2 * k), "last quarter": (T - T // 4, T)}
    assert {part["name"]: (part["start"], part["stop"]) for part in row["by_position"]} == parts
    for part in row["by_position"]:
        assert part["loss"] == pytest.approx(nll[:, part["start"] : part["stop"]].mean())
        assert part["loss_without_learning"] == pytest.approx(without[:, part["start"] : part["stop"]].mean())
    assert row["difference"] == pytest.approx(row["loss"] - row["loss_without_learning"]) and row["difference"] < 0


def test_parts_are_quarters_where_no_window_is_shorter(tmp_path):
    (row,) = write_report([make_run(tmp_path / "run", kind="full")], tmp_path / "report")["rows"]
    assert [part["name"] for part in row["by_position"]] == ["first quarter", "second quarter", "last quarter"]
    assert row["loss_without_learning"] is None and row["difference"] is None


def test_table_for_the_terminal(tmp_path):
    runs = [make_run(tmp_path / "e2e"), make_run(tmp_path / "new", kind="window", evaluated=False)]
    rows = write_report(runs, tmp_path / "report")["rows"]
    header, rule, *lines = format_table(rows).splitlines()
    assert "first window" in header and set(rule) == {"-", " "}
    assert ["learning" in lines[0], "not learning" in lines[1], "difference" in lines[2]] == [True] * 3
    assert f"{rows[0]['difference']:+.4f}" in lines[2] and lines[3].startswith("new") and "not evaluated" in lines[3]
    assert "first window 0 to 127, second window 128 to 255, last quarter 768 to 1023" in "\n".join(lines)


def test_a_run_not_evaluated_has_no_plot_by_position(tmp_path):
    summary = write_report([make_run(tmp_path / "run", evaluated=False)], tmp_path / "report")
    assert "loss_by_position" not in summary["files"] and not (tmp_path / "report/loss_by_position.png").exists()
    table = format_table(summary["rows"])
    assert "Positions in context" not in table and "ttt-e2e evaluate --workdir" in table


def test_long_contexts_are_plotted_and_tabulated_where_there_are_any(tmp_path):
    runs = [
        evaluate_long_contexts(make_run(tmp_path / "e2e", evaluated=False)),
        evaluate_long_contexts(make_run(tmp_path / "full", kind="full"), (256, 512), (2,), learns=False, stretches=1),
        make_run(tmp_path / "new", evaluated=False),
    ]
    summary = write_report(runs, tmp_path / "report")
    plots = {"training", "loss_by_position", "context_lengths", "needle", "models"}
    assert {name for name, path in summary["files"].items() if path.endswith(".png")} == plots
    assert json.loads((tmp_path / "report/report.json").read_text()) == summary["rows"]
    first, _, new = summary["rows"]
    assert [entry["length"] for entry in first["context_lengths"]] == [512, 1024, 2048]
    assert [task["task"] for task in first["needle"]] == [1, 3]
    assert new["context_lengths"] is new["needle"] is new["generation"] is None

    page = parse((tmp_path / "report/report.html").read_text())
    assert len(page.sources) == 5
    cells = ["runs/<judge>", "3", "32", "50", "–", "2.5000", "1.2500", "2.3750", "1.2500"]
    at = page.text.index(cells[0])
    assert [text for text in page.text[at:] if text.strip()][: len(cells)] == cells
    line = next(line for line in format_table(summary["rows"]).splitlines() if "runs/<judge>" in line)
    assert line.split() == ["e2e", *cells]


@pytest.mark.parametrize("run_index", [0, 1])
def test_every_number_of_a_result_is_in_its_figure(tmp_path, run_index):
    sizes = [{"lengths": (512, 1024, 2048), "tasks": (1, 3)}, {"lengths": (256, 4096), "tasks": (2,), "stretches": 1}]
    workdir = evaluate_long_contexts(make_run(tmp_path / "run"), **sizes[run_index])
    runs = read_runs([workdir])
    top, bottom = evaluations()["context_lengths"].figure(runs).axes
    losses = [entry["loss"] for entry in runs[0].results["context_lengths"]["lengths"]]
    assert list(top.get_lines()[0].get_ydata()) == losses
    assert list(top.get_lines()[0].get_xdata()) == list(sizes[run_index]["lengths"])
    assert list(bottom.get_lines()[0].get_ydata()) == [loss - losses[0] for loss in losses]
    assert [text.get_text() for text in top.get_legend().get_texts()] == ["run", "run, not learning"]
    texts = [text.get_text() for panel in evaluations()["needle"].figure(runs).axes for text in panel.texts]
    count = len(runs[0].results["needle"]["cells"])
    assert texts == ["25%"] * count + ["+0.50"] * count + ["-0.12"] * count


def test_several_runs_are_compared_with_the_first_at_each_length(tmp_path):
    workdirs = [
        evaluate_long_contexts(make_run(tmp_path / "a"), (512, 1024, 2048), learns=False),
        evaluate_long_contexts(make_run(tmp_path / "b"), (1024, 2048, 4096)),
    ]
    _, bottom = evaluations()["context_lengths"].figure(read_runs(workdirs)).axes
    assert bottom.get_title(loc="left") == "Difference from a at the same length"
    first, second, without = [line.get_xydata().tolist() for line in bottom.get_lines() if line.get_marker() == "o"]
    assert first == [[512, 0], [1024, 0], [2048, 0]]
    assert second == without == [[1024, 0.25], [2048, 0.25]]  # b's losses at 1024 are a's at 512


def test_many_runs_have_a_legend_beside_the_panels_and_colours_of_their_own(tmp_path):
    kinds = ("e2e", "window", "full")
    runs = read_runs([make_run(tmp_path / f"run{i}", kind=kinds[i % 3]) for i in range(8)])
    figure = evaluations()["token_losses"].figure(runs)
    top, _ = figure.axes
    assert top.get_legend() is None and len(figure.legends) == 1
    assert len({line.get_color() for line in top.get_lines() if line.get_linestyle() == "-"} - {"#bbbbbb"}) == 8


@pytest.mark.parametrize("count", [1, 8, 9, 20])
def test_every_run_has_a_colour_of_its_own(count):
    assert len(set(colors_of([None] * count))) == count


def test_a_legend_of_long_names_takes_nothing_from_the_panels(tmp_path):
    widths = []
    for name in ("short", "a_very_long_name_of_a_run_such_as_sweeps_have_" * 2):
        runs = read_runs([make_run(tmp_path / f"{name}{i}", kind="window") for i in range(8)])
        figure = evaluations()["token_losses"].figure(runs)
        figure.canvas.draw()
        widths.append(figure.axes[0].get_window_extent().width)
    assert widths[0] == pytest.approx(widths[1], rel=0.02)


def test_figures_of_an_earlier_report_do_not_stay(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.png").touch()
    workdirs = [evaluate_long_contexts(make_run(tmp_path / name, steps=20)) for name in ("a", "b")]
    write_report(workdirs, tmp_path / "out")
    write_report([make_run(tmp_path / "new", evaluated=False, steps=20)], tmp_path / "out")
    names = ["notes.png", "report.html", "report.json", "training.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


NAMES = ["实验_1", "実験", "🙂", "a$b$c", "\\frac{$", "_hidden", "tab\tnew\nline"]


def test_names_that_the_fonts_lack_are_escaped_in_figures_alone(tmp_path):
    """No glyph is missing, and no name is left out or taken for a formula. (DejaVu Sans, the default, has emoji.)"""
    runs = [make_run(tmp_path / f"run{i}" / name, kind="window", steps=20) for i, name in enumerate(NAMES)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = write_report(runs, tmp_path / "out")["rows"]
    assert [row["run"] for row in rows] == NAMES
    families = fonts_for(["plain", *NAMES])
    assert drawable("plain-1_é", families) == "plain-1_é"
    assert drawable("_hidden", families) == " _hidden"
    assert "\n" not in drawable("tab\tnew\nline", families)
    top, _ = (
        evaluations()["token_losses"]
        .figure([dataclasses.replace(run, name=drawable(run.name, families)) for run in read_runs(runs)])
        .axes
    )
    assert len(top.get_legend_handles_labels()[0]) == len(NAMES)


def test_an_installed_font_draws_what_the_default_lacks(tmp_path):
    """A font of two characters, which the test makes."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    characters = {"experiment_1": "实", "experiment_2": "验"}
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 0))
    pen.lineTo((250, 700))
    pen.closePath()
    glyph = pen.glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", *characters])
    builder.setupCharacterMap({ord(character): name for name, character in characters.items()})
    builder.setupGlyf({name: glyph for name in (".notdef", *characters)})
    builder.setupHorizontalMetrics({name: (600, 0) for name in (".notdef", *characters)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Of The Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")
    before = list(font_manager.fontManager.ttflist)
    try:
        font_manager.fontManager.addfont(tmp_path / "font.ttf")
        families = fonts_for(["实验 1"])
        assert families[1:] == ["Of The Test"]
        assert drawable("实验 1 実", families) == "实验 1 \\u5b9f"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write_report([make_run(tmp_path / "实验", evaluated=False, steps=20)], tmp_path / "out")
    finally:
        font_manager.fontManager.ttflist[:] = before


def test_costs_are_drawn_for_each_run(tmp_path):
    rows = write_report([make_run(tmp_path / kind, kind=kind) for kind in ("e2e", "full")], tmp_path / "out")["rows"]
    rows[1]["tokens_per_second"] = None
    panels = costs_figure(rows, ["#000000", "#ffffff"]).axes
    for panel, field in zip(panels, ("num_parameters", "state_bytes", "tokens_per_second")):
        assert [bar.get_width() for bar in panel.patches] == [row[field] or 0 for row in rows]
    assert panels[-1].texts[1].get_text() == "–"


def test_differing_tokenizers_are_said(tmp_path):
    workdirs = [make_run(tmp_path / kind, kind=kind) for kind in ("e2e", "window", "full")]
    for workdir, tokenizer in zip(workdirs, ("bytes", "bytes", None)):
        _add_metrics(workdir, {"tokenizer": tokenizer, "bits_per_byte": 1.0} if tokenizer else {})
    assert "tokenizers differ" not in format_table(write_report(workdirs, tmp_path / "same")["rows"])
    _add_metrics(workdirs[2], {"tokenizer": "0123", "bits_per_byte": 1.0})
    summary = write_report(workdirs, tmp_path / "other")
    assert "tokenizers differ" in format_table(summary["rows"])
    assert "tokenizers differ" in (tmp_path / "other/report.html").read_text()
    assert [row["tokenizer"] for row in summary["rows"]] == ["bytes", "bytes", "0123"]


def test_costs_are_tabulated(tmp_path):
    workdirs = [make_run(tmp_path / kind, kind=kind, evaluated=False) for kind in ("e2e", "window", "full")]
    summary = write_report(workdirs, tmp_path / "report")
    rows = {row["run"]: row for row in summary["rows"]}
    position = 2 * 128 * 4  # bytes of the keys and values of one position in a block of width 128, float32
    assert rows["full"]["state_bytes"] == 4 * T * position
    assert rows["window"]["state_bytes"] == 4 * k * position
    fast = 3 * 128 * 352 * 4
    assert rows["e2e"]["state_bytes"] == 4 * k * position + fast
    assert rows["e2e"]["tokens_per_second"] == pytest.approx(2e4, rel=0.02)
    line = next(line for line in format_table(summary["rows"]).splitlines() if "4.194" in line)
    assert line.split()[0] == "full" and "4.194" in " ".join(parse((tmp_path / "report/report.html").read_text()).text)


def test_bits_per_byte_are_shown_where_there_are_any(tmp_path):
    workdirs = [make_run(tmp_path / kind, kind=kind) for kind in ("e2e", "full")]
    assert "bits/byte" not in format_table(write_report(workdirs, tmp_path / "none")["rows"])
    _add_metrics(workdirs[0], {"bits_per_byte": 1.25, "bits_per_byte_without_learning": 1.5})
    header, _, *lines = format_table(write_report(workdirs, tmp_path / "some")["rows"]).splitlines()
    at = header.index("bits/byte") + len("bits/byte")
    assert [line[:at].split()[-1] for line in lines[:4]] == ["1.2500", "1.5000", "-0.2500", "–"]


@pytest.mark.parametrize("name, field", [("context_lengths", "lengths"), ("needle", "cells"), ("generation", "judge")])
def test_a_result_of_another_form_is_named(tmp_path, name, field):
    workdir = evaluate_long_contexts(make_run(tmp_path / "run", steps=3))
    path = workdir / f"evaluation/{name}.json"
    result = json.loads(path.read_text())
    del result[field]
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=rf"{name}.json has no '{field}': evaluate the run again"):
        write_report([workdir], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_runs_of_one_name_are_told_apart(tmp_path):
    workdirs = [make_run(tmp_path / parent / "run", evaluated=False) for parent in ("a", "b")]
    workdirs.append(make_run(tmp_path / "other", evaluated=False))
    rows = write_report(workdirs, tmp_path / "report")["rows"]
    assert [row["run"] for row in rows] == ["a/run", "b/run", "other"]
    with pytest.raises(UserError, match="twice"):
        write_report([workdirs[0], tmp_path / "b" / ".." / "a" / "run"], tmp_path / "report")


def test_names_are_escaped(tmp_path):
    write_report([make_run(tmp_path / "<b>&run", evaluated=False)], tmp_path / "report")
    page = (tmp_path / "report/report.html").read_text()
    parse(page)
    assert "&lt;b&gt;&amp;run" in page and "<b>" not in page


def test_a_last_line_cut_short_is_forgiven_and_nothing_else(tmp_path):
    workdir = make_run(tmp_path / "run", evaluated=False, steps=20)
    metrics = workdir / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 21, "lo')
    (row,) = write_report([workdir], tmp_path / "report")["rows"]
    assert row["step"] == 20
    for broken in (whole + '{"step": 21, "lo\n', '{"step": 0, "lo\n' + whole):
        metrics.write_text(broken)
        with pytest.raises(UserError, match=r"metrics.jsonl, line \d+ is not readable JSON"):
            write_report([workdir], tmp_path / "report")


def test_steps_logged_again_after_a_restart_count_once(tmp_path):
    workdir = make_run(tmp_path / "run", evaluated=False, steps=20)
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 10, "loss": 9.0}) + "\n")
    (row,) = write_report([workdir], tmp_path / "report")["rows"]
    assert row["step"] == 20 and row["train_loss"] < 9


def test_a_run_with_nothing_but_broken_numbers_is_still_drawn(tmp_path):
    workdir = make_run(tmp_path / "run", evaluated=False)
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n')
    assert write_report([workdir], tmp_path / "report")["rows"][0]["step"] == 2


def test_an_imported_model_is_shown_once_it_is_evaluated(tmp_path):
    """It has no training: `import` writes no metrics."""
    trained, imported = make_run(tmp_path / "trained"), make_run(tmp_path / "imported", kind="full")
    (imported / "metrics.jsonl").unlink()
    summary = write_report([imported, trained], tmp_path / "both")
    assert [row["train_loss"] is None for row in summary["rows"]] == [True, False]
    assert "training" in summary["files"] and summary["rows"][0]["loss"] is not None
    assert {"training", "loss_by_position"} & set(write_report([imported], tmp_path / "one")["files"]) == {
        "loss_by_position"
    }
    (imported / "evaluation" / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl is missing"):
        write_report([imported], tmp_path / "none")


def _add_metrics(workdir, figures):
    path = workdir / "evaluation" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | figures))


def _remove(name):
    return lambda workdir: (workdir / name).unlink()


def _write(name, text):
    return lambda workdir: (workdir / name).write_text(text)


def _save(array):
    return lambda workdir: np.save(workdir / "evaluation/token_nll.npy", array)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_remove("config.json"), "is no run directory: it has no config.json"),
        (_write("config.json", "{"), "config.json is not readable JSON"),
        (_write("config.json", "[]"), "config.json holds list"),
        (_write("config.json", '{"model": {"windw": 1}}'), "config.json: config.model has no field 'windw'"),
        (_write("metrics.jsonl", ""), "holds no training step"),
        (_write("metrics.jsonl", "[1]\n"), "integer 'step'"),
        (_write("evaluation/metrics.json", "{}"), "has no 'loss'"),
        (_write("evaluation/metrics.json", "nonsense"), "metrics.json is not readable JSON"),
        (_remove("evaluation/token_nll.npy"), "token_nll.npy is missing"),
        (_remove("evaluation/token_nll_without_learning.npy"), "token_nll_without_learning.npy is missing"),
        (_write("evaluation/token_nll.npy", ""), "not a readable .npy array"),
        (_save(np.zeros((2, 7), np.float32)), r"takes floats \[sequences, 1024\]"),
        (_save(np.zeros((0, T), np.float32)), "takes floats"),
    ],
)
def test_damage_is_named_and_nothing_is_written(tmp_path, spoil, message):
    workdir = make_run(tmp_path / "run", steps=3)
    spoil(workdir)
    with pytest.raises(UserError, match=message) as error:
        write_report([workdir], tmp_path / "report")
    assert "\n" not in str(error.value) and str(workdir) in str(error.value)
    assert not (tmp_path / "report").exists()


def test_no_runs(tmp_path):
    with pytest.raises(UserError, match="--workdirs is empty"):
        write_report([], tmp_path / "report")


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "report").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([make_run(tmp_path / "run", steps=3)], tmp_path / "report")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'ttt-e2e\[plot\]'"):
        write_report([tmp_path], tmp_path / "report")
