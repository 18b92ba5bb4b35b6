"""A model that computes NaN: null in the files, one line that says where, exit code 1, and reports of what is left."""

import json

import numpy as np
import pytest

from tests.evaluation.conftest import BOS, FakeReader
from tests.test_strict_json import parse
from ttt_e2e.evaluation.base import evaluations
from ttt_e2e.evaluation.records import Records
from ttt_e2e.evaluation.report import format_table, write_report
from ttt_e2e.evaluation.runs import read_runs
from ttt_e2e.evaluation.subject import Subject

DIVERGES_AFTER = 280  # tokens that are read


def logits_of(tokens_n) -> np.ndarray:
    """Evenly divided among bytes, which none is BOS, and NaN once so many tokens were read."""
    logits_V = np.where(np.arange(257) == BOS, -30.0, 0.0)
    return logits_V if len(tokens_n) <= DIVERGES_AFTER else np.full(257, np.nan)


@pytest.fixture
def diverging(monkeypatch):
    monkeypatch.setattr(Subject, "reader", lambda subject, _: FakeReader(subject.config, logits_of))


# Flags -> what diverges first.
DIVERGING = {
    "--context_lengths=16,300 --num_stretches=2": "context_lengths: nll of length 300, stretch 0 is NaN or infinite",
    "--needle=2 --needle_lengths=230,300 --needle_depths=0 --needle_samples=2": (
        "needle: nll of task 2, length 300, depth 0, sample 0 is NaN or infinite"
    ),
    "--generation --generation_prompt_tokens=270 --generation_tokens=20 --generation_samples=2": (
        "generation: own_nll of stage generated, sample 0 is NaN or infinite"
    ),
}


@pytest.mark.usefixtures("diverging")
@pytest.mark.parametrize("flags", DIVERGING)
def test_what_diverged_is_null_and_said(flags, run, workdir, tmp_path):
    name = DIVERGING[flags].partition(":")[0]
    command = ["evaluate", f"--workdir={workdir}", f"--output={tmp_path}", *flags.split()]
    code, out, lines = run(*command)
    assert code == 1, lines
    assert lines == [f"error: {DIVERGING[flags]}, from checkpoint {workdir}; in {tmp_path} such numbers are null"]
    assert parse(out)[name]["diverged"] in lines[0]
    result = parse((tmp_path / f"{name}.json").read_text())
    records = [parse(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert result["diverged"] in lines[0] and len(records) > 2
    code, again, _ = run(*command)  # from the records
    assert (code, again) == (1, out)


@pytest.mark.usefixtures("diverging")
def test_lengths_that_did_not_diverge_have_their_losses(run, workdir, tmp_path):
    run("evaluate", f"--workdir={workdir}", f"--output={tmp_path}", *next(iter(DIVERGING)).split())
    at_16, at_300 = parse((tmp_path / "context_lengths.json").read_text())["lengths"]
    assert at_16["loss"] == pytest.approx(np.log(256), rel=1e-6) and at_300["loss"] is None
    code, _, lines = run("evaluate", f"--workdir={workdir}", f"--output={tmp_path}", "--context_lengths=16")
    assert (code, [line for line in lines if line.startswith("error")]) == (0, [])


@pytest.mark.usefixtures("diverging")
def test_a_continuation_ends_where_it_diverges(run, workdir, tmp_path):
    run("evaluate", f"--workdir={workdir}", f"--output={tmp_path}", *list(DIVERGING)[2].split())
    _, *records = [parse(line) for line in (tmp_path / "generation.jsonl").read_text().splitlines()]
    generated = [record for record in records if record["stage"] == "generated"]
    assert [(len(r["tokens"]), r["ended_by"]) for r in generated] == [(DIVERGES_AFTER - 270, "diverged")] * 2


def test_the_first_record_that_diverged_is_named_after_a_restart_too(tmp_path):
    def records():
        return Records(tmp_path, "toy", {}, key=("length", "text"))

    records().add([{"length": 9, "text": 1, "nll": float("inf")}, {"length": 8, "text": 2, "nll": float("nan")}])
    assert records().finish({})["diverged"] == "nll of length 8, text 2 is NaN or infinite"
    assert "diverged" not in Records(tmp_path, "other", {}, key=("n",)).finish({})


def test_the_default_evaluation_names_the_position(run, workdir, tmp_path):
    """An inner learning rate far too high, on a real model: after its first step products are infinite."""
    more = ["--config.inner.learning_rate=9e18", "--config.eval.num_sequences=2"]
    code, out, lines = run("evaluate", f"--workdir={workdir}", f"--output={tmp_path}", *more)
    assert code == 1, lines
    (error,) = [line for line in lines if line.startswith("error")]
    # The mini-batch is 8: position 8 is the first that is scored by the new weights.
    assert "token_losses: token_nll is nan at position 8 of held-out sequence 0, both counted from 0" in error
    metrics = parse((tmp_path / "metrics.json").read_text())
    assert metrics["loss"] is None and metrics["loss_without_learning"] > 0 and metrics["diverged"] in error
    assert parse(out) == metrics | {"output": str(tmp_path)}
    assert np.isfinite(np.load(tmp_path / "token_nll.npy")[:, :8]).all()


@pytest.mark.parametrize("as_written_before", [False, True])
def test_reports_show_what_did_not_diverge(tmp_path, as_written_before):
    from tests.evaluation.test_report import evaluate_long_contexts, make_run

    workdirs = [evaluate_long_contexts(make_run(tmp_path / name, steps=20)) for name in ("whole", "diverged")]
    folder = workdirs[1] / "evaluation"
    nll = np.load(folder / "token_nll.npy")
    nll[3:, 700:] = np.nan
    np.save(folder / "token_nll.npy", nll)

    def damage(name, change):
        result = json.loads((folder / name).read_text())
        change(result)
        text = json.dumps(result)
        (folder / name).write_text(text if as_written_before else text.replace("NaN", "null"))

    nan = float("nan")
    damage("metrics.json", lambda r: r.update(loss=nan, token_loss=nan, diverged="at position 700"))
    damage("context_lengths.json", lambda r: r["lengths"][2].update(loss=nan, difference=nan, standard_error=nan))
    damage("needle.json", lambda r: r["cells"][2].update(recall_gain=nan, value_gain=nan))
    damage("generation.json", lambda r: r["generated"].update(judge_nll_per_token=nan))

    rows = write_report(workdirs, tmp_path / "out")["rows"]
    assert [row["loss"] is None for row in parse((tmp_path / "out/report.json").read_text())] == [False, True]
    table = format_table(rows)
    assert "diverged diverged: at position 700." in table and "nan" not in table and "not evaluated" not in table
    texts = [
        text.get_text() for panel in evaluations()["needle"].figure(read_runs(workdirs)).axes for text in panel.texts
    ]
    assert texts.count("–") == 2
