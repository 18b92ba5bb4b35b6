"""An evaluation is one class: this file has a whole one, and nothing else knows of it."""

import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.base import REGISTERED, Evaluation, evaluations, register
from ttt_e2e.evaluation.records import Records
from ttt_e2e.figures import make_figure
from ttt_e2e.settings import setting


@dataclass(frozen=True)
class Settings:
    """What is asked for. Raises `UserError` for what means nothing."""

    copies: int = setting("repetition_copies", "How often the text is read.", 2)
    tokens: int = setting("repetition_tokens", "Tokens of the text.", 12)

    def __post_init__(self):
        if self.copies < 2:
            raise UserError(f"repetition_copies is {self.copies}, but it must be at least 2")


class Repetition(Evaluation):
    """Reads a text several times over: the gain is the loss of its first copy less that of its last."""

    name = "repetition"
    help = "Instead: how much is gained by reading the same text again."
    Settings = Settings
    fields = ("first", "last", "gain", "count")
    columns = ("gain", "count")
    note = "Gain: loss of the first copy of a text less that of the last, in nats per token."
    caption = "Repetition: loss of each copy of the same text."

    def check(self, subject, settings):
        if subject.store.num_tokens < settings.tokens:
            raise UserError(f"repetition_tokens is {settings.tokens}, but there are {subject.store.num_tokens}")

    def evaluate(self, subject, output, settings):
        reader = subject.reader(settings.copies * settings.tokens)
        records = Records(output, self.name, subject.about(reader, settings), key=("text",))
        for batch, filled in records.unfinished((), 3, subject.config.eval.batch_size):
            n = settings.tokens
            texts = np.stack([subject.store.stretch(i * n, i * n + n) for i in filled])
            _, nll = reader.read(reader.start(subject.bos_id, len(filled)), np.tile(texts, settings.copies))
            ends = nll[:, :n].mean(axis=1), nll[:, -n:].mean(axis=1)
            rows = zip(batch, *ends)
            records.add([{"text": i, "first": float(first), "last": float(last)} for i, first, last in rows])
        first, last = (float(np.mean([r[name] for r in records.done.values()])) for name in ("first", "last"))
        return records.finish({"first": first, "last": last, "gain": first - last, "count": len(records.done)})

    def figure(self, runs):
        figure = make_figure()
        panel = figure.subplots()
        for run in runs:
            if result := run.results[self.name]:
                panel.plot([result["first"], result["last"]], label=run.name)
        return figure


@pytest.fixture
def registered():
    register(Repetition)
    yield
    del REGISTERED[Repetition.name]


@pytest.mark.usefixtures("registered")
def test_an_evaluation_has_flags_a_run_a_result_and_its_part_of_a_report(run, workdir, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.json").write_bytes((workdir / "config.json").read_bytes())
    (copy / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    output = copy / "evaluation"
    flags = ("--repetition", "--repetition_copies=3")
    code, out, _ = run("evaluate", f"--workdir={copy}", f"--checkpoint={workdir}", f"--output={output}", *flags)
    assert code == 0
    result = json.loads((output / "repetition.json").read_text())
    assert result["about"]["settings"] == {"copies": 3, "tokens": 12}
    assert json.loads(out)["repetition"] == {name: result[name] for name in Repetition.fields}
    assert result["count"] == 3 and result["gain"] == result["first"] - result["last"]
    assert len((output / "repetition.jsonl").read_text().splitlines()) == 1 + 3

    code, out, _ = run("report", f"--workdirs={copy}", f"--output={tmp_path / 'report'}")
    assert code == 0
    assert ["run", f"{result['gain']:.4f}", "3"] in [line.split() for line in out.splitlines()]
    assert Repetition.note in out
    assert (tmp_path / "report/repetition.png").read_bytes().startswith(b"\x89PNG")
    (row,) = json.loads((tmp_path / "report/report.json").read_text())
    assert row["repetition"] == {name: result[name] for name in Repetition.fields}
    page = (tmp_path / "report/report.html").read_text()
    assert Repetition.caption in page and f"<td>{result['gain']:.4f}</td>" in page

    del result["gain"]
    (output / "repetition.json").write_text(json.dumps(result))
    code, _, lines = run("report", f"--workdirs={copy}", f"--output={tmp_path / 'report'}")
    assert code == 2 and lines[0].endswith("repetition.json has no 'gain': evaluate the run again")


BAD_INPUT = {
    "--repetition --repetition_copies=1": "repetition_copies is 1, but it must be at least 2",
    "--repetition --repetition_copies=x": "repetition_copies",
    "--repetition --repetition_tokens=5000": "repetition_tokens is 5000, but there are 2016",
    "--repetition_copies=3": "--repetition_copies belongs to --repetition, which is missing",
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("flags", BAD_INPUT)
def test_its_bad_input_is_one_line_and_leaves_nothing(flags, check_refused):
    check_refused(flags, BAD_INPUT[flags])


def test_the_files_of_the_room_are_the_evaluations():
    assert list(evaluations()) == ["token_losses", "context_lengths", "generation", "lm_eval", "needle"]
    assert [each.name for each in evaluations().values() if each.is_default] == ["token_losses"]
    for name, each in evaluations().items():
        assert each.name == name and type(each).__module__ == f"ttt_e2e.evaluation.{name}"


def test_flags_are_made_without_jax():
    """JAX takes seconds to import: help and bad flags come without."""
    code = (
        "import sys; from absl import flags; from ttt_e2e.evaluation.flags import define; define(flags.FlagValues());"
        "assert not {'jax', 'tensorstore', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
