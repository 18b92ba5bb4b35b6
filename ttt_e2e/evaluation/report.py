"""Writes a report on one or several runs: an HTML page with tables and plots of training and of evaluations."""

import base64
import html
import io
import os
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from etils import epath

from ttt_e2e.config import ModelConfig, to_dict
from ttt_e2e.evaluation import token_losses
from ttt_e2e.evaluation.base import Table, evaluations, number
from ttt_e2e.evaluation.plots import colors_of, costs_figure, training_figure
from ttt_e2e.evaluation.runs import Run, read_runs
from ttt_e2e.figures import drawable, fonts_for, require_matplotlib
from ttt_e2e.outputs import writing
from ttt_e2e.runs.files import replace_bytes, replace_text
from ttt_e2e.strict_json import to_json

NUM_WORD_COLUMNS = 4  # columns at the left of the first table that are text; the others are numbers

NOT_LEARNING_NOTE = (
    "Not learning: the same model with its inner learning rate at 0. That is what it costs to switch off what the "
    "model was trained to rely on, not what a model trained without it would lose."
)
COSTS_NOTE = (
    "State: what one sequence has read, after so many tokens: KV caches, recurrent states, fast weights. Tokens/s: "
    "median of the logged training steps; it compares only runs of one machine."
)


def write_report(workdirs: Sequence[str | os.PathLike], output: str | os.PathLike) -> dict:
    """Writes `report.html`, `report.json`, `training.png`, and a figure for each evaluation that some run has.

    Imported models, which have no training, are shown once they are evaluated. Of several runs, there is a figure of
    what they cost, too, `models.png`.

    Args:
      workdirs: run directories, in the order in which to show them; the lower panel of `loss_by_position.png` compares
        with the first evaluated one.
      output: directory to write into, created if needed.

    Returns:
      `files`, paths by name, and `rows`, one dict for each run (the contents of `report.json`).

    Raises:
      UserError: there are no workdirs, one of them is no run directory or has a file that cannot be read, matplotlib is
        not installed, or `output` cannot be made a directory; nothing is written.
    """
    require_matplotlib()
    runs = read_runs(workdirs)
    sections = _sections(runs)
    rows = [_row(run, sections) for run in runs]

    output = epath.Path(output)
    with writing(f"--output {output}"):
        output.mkdir(parents=True, exist_ok=True)
    figures, files = _figures(runs, rows), {}
    for name in _figure_names() - figures.keys():  # of the runs of an earlier report
        (output / f"{name}.png").unlink(missing_ok=True)
    for name, (png, _) in figures.items():
        files[name] = output / f"{name}.png"
        replace_bytes(files[name], png)
    files["json"], files["html"] = output / "report.json", output / "report.html"
    replace_text(files["json"], to_json(rows, indent=2) + "\n")
    replace_text(files["html"], _page(runs, rows, figures))
    return {"files": {name: str(path) for name, path in files.items()}, "rows": rows}


def format_table(rows: Sequence[dict]) -> str:
    """Formats the rows of `write_report` as plain-text tables for a terminal, each with a note on its columns."""
    notes = [textwrap.fill(note, 110) for note in _notes(rows)]
    parts = [_text_table(*_table(rows), NUM_WORD_COLUMNS), "\n".join(notes)]
    costs = _costs(rows)
    parts += [_text_table(costs.header, costs.lines, costs.num_words), textwrap.fill(costs.note, 110)]
    for table in _tables(rows).values():
        parts += [_text_table(table.header, table.lines, table.num_words), textwrap.fill(table.note, 110)]
    return "\n\n".join(filter(None, parts))


def _figure_names() -> set[str]:
    """Names of the files, without .png, of all figures that a report can have."""
    return {evaluation.figure_name or name for name, evaluation in evaluations().items()} | {"models", "training"}


def _figures(runs: list[Run], rows: list[dict]) -> dict[str, tuple[bytes, str]]:
    """Draws the figures that some run has results for: (PNG bytes, caption) by the name of the file, without .png."""
    import matplotlib

    families = fonts_for(run.name for run in runs)
    runs = [replace(run, name=drawable(run.name, families)) for run in runs]
    rows = [row | {"run": run.name} for run, row in zip(runs, rows)]
    figures = {}
    with matplotlib.rc_context({"font.family": families}):
        for name, evaluation in evaluations().items():
            if any(run.results[name] for run in runs) and (figure := evaluation.figure(runs)):
                figures[evaluation.figure_name or name] = (_png(figure), evaluation.caption)
        if len(runs) > 1:
            figures["models"] = (_png(costs_figure(rows, colors_of(runs))), COSTS_CAPTION)
        if any(run.training for run in runs):
            figures["training"] = (_png(training_figure(runs)), TRAINING_CAPTION)
        return figures


def _png(figure) -> bytes:
    contents = io.BytesIO()
    figure.savefig(contents, format="png", dpi=150)
    return contents.getvalue()


def _tables(rows: Sequence[dict]) -> dict[str, Table]:
    """The table of each evaluation that has one, by the name of the evaluation."""
    tables = {}
    for name, evaluation in evaluations().items():
        results = {row["run"]: row[name] for row in rows if row.get(name)}
        if results and (table := evaluation.table(results)):
            tables[name] = table
    return tables


def _text_table(header: list[str], lines: list[list[str]], num_words: int) -> str:
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def text(line):
        is_words = [i < num_words for i in range(len(line))]
        return "  ".join(c.ljust(w) if words else c.rjust(w) for c, w, words in zip(line, widths, is_words)).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([text(header), rule, *map(text, lines)])


# ----------------------------------------------------------------------------------------------------------- the table


def _sections(runs: list[Run]) -> tuple[int, str]:
    """Length in tokens, and name, of the first two sections of the context in the table; the same for all runs.

    It is the shortest window of any run, past which attention no longer reaches the beginning, or a quarter of the
    shortest context where two windows do not fit.
    """
    lengths = [len(run.results[token_losses.NAME].nll_T) for run in runs if run.results[token_losses.NAME]]
    windows = [window for run in runs for window in run.config.model.windows]
    shortest = min(lengths, default=4)
    if windows and 2 * min(windows) <= shortest:
        return min(windows), "window"
    return max(1, shortest // 4), "quarter"


def _row(run: Run, sections: tuple[int, str]) -> dict:
    """A run's entry in `report.json`."""
    model, held_out = run.config.model, run.results[token_losses.NAME]
    metrics = held_out.metrics if held_out else {}
    loss, without = metrics.get("loss"), metrics.get("loss_without_learning")
    num_parameters = _num_parameters(model)
    last = run.training[-1] if run.training else {}
    speeds = [line["tokens_per_second"] for line in run.training if line.get("tokens_per_second")]
    return {
        "run": run.name,
        "kind": model_kind(model),
        "model": _describe(model),
        "size": f"{model.num_hidden_layers} x {model.hidden_size}, {num_parameters / 1e6:.2f}M",
        "num_parameters": num_parameters,
        "state_bytes": _state_bytes(run),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "step": metrics.get("step", last.get("step")),
        "train_loss": last.get("loss"),
        "loss": loss,
        "loss_without_learning": without,
        "difference": None if loss is None or without is None else loss - without,
        "diverged": metrics.get("diverged"),
        "token_loss": metrics.get("token_loss"),
        "token_loss_without_learning": metrics.get("token_loss_without_learning"),
        "tokenizer": metrics.get("tokenizer"),
        "bits_per_byte": metrics.get("bits_per_byte"),
        "bits_per_byte_without_learning": metrics.get("bits_per_byte_without_learning"),
        "num_sequences": metrics.get("num_sequences"),
        "seq_len": metrics.get("seq_len", run.config.train.seq_len),
        "by_position": _by_position(held_out, *sections) if held_out else [],
        **{
            name: evaluation.row(result) if (result := run.results[name]) else None
            for name, evaluation in evaluations().items()
            if not evaluation.is_default
        },
    }


def _by_position(held_out: token_losses.HeldOut, length: int, unit: str) -> list[dict]:
    """Mean losses of the first two sections of `length` tokens, and of the last quarter of the context."""
    nll_T, without_T = held_out.nll_T, held_out.nll_without_learning_T
    T = len(nll_T)
    bounds = [(f"first {unit}", 0, length), (f"second {unit}", length, 2 * length), ("last quarter", T - T // 4, T)]
    return [
        {
            "name": name,
            "start": start,
            "stop": stop,
            "loss": float(nll_T[start:stop].mean()),
            "loss_without_learning": None if without_T is None else float(without_T[start:stop].mean()),
        }
        for name, start, stop in bounds
    ]


def model_kind(model: ModelConfig) -> str:
    """Names the kind of a model: `e2e` (has fast weights), `window`, `full` (attention), or `mixed` (other mixers)."""
    if model.num_fast_blocks:
        return "e2e"
    kinds = set(model.mixers)
    return "window" if kinds == {"window"} else "full" if kinds == {"attention"} else "mixed"


def _describe(model: ModelConfig) -> str:
    kind = model_kind(model)
    names = {"window": f"window {model.sliding_window}", "attention": "full attention"}
    mixers = ", ".join(names.get(name, name) for name in dict.fromkeys(model.mixers))
    described = mixers if kind in ("window", "mixed") else kind if kind == "full" else f"{kind}, {mixers}"
    engram = "engram of one row" if model.engram.one_row else "engram"
    return f"{described}, {engram} in {model.engram.blocks}" if model.engram.blocks else described


def _num_parameters(model: ModelConfig) -> int:
    """Counts the parameters that can be trained."""
    import jax

    from ttt_e2e.model import abstract_model, parameter_traits
    from ttt_e2e.model.parameters import parameter_name

    leaves, traits = jax.tree_util.tree_leaves_with_path(abstract_model(model)[1]), parameter_traits(model)
    return sum(leaf.size for path, leaf in leaves if traits[parameter_name(path)].rate)


def _state_bytes(run: Run) -> int:
    from ttt_e2e.model import state_bytes

    return state_bytes(run.config.model, run.config.train.seq_len)


def _costs(rows: Sequence[dict]) -> Table:
    """The table of what the models cost."""

    def rounded(value: float | None) -> str:
        return "–" if value is None else f"{value:,.0f}"

    lines = []
    for row in rows:
        state = f"{row['state_bytes'] / 1e6:,.3f}"
        words, numbers = [row["run"], row["model"]], [rounded(row["num_parameters"]), state, str(row["seq_len"])]
        lines.append([*words, *numbers, rounded(row["tokens_per_second"])])
    header = ["run", "model", "parameters", "state, MB", "after", "tokens/s"]
    return Table(header, lines, 2, COSTS_NOTE)


def _table(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the first table.

    A run has one line, or three where it was evaluated with and without learning.
    """
    names = next(([part["name"] for part in row["by_position"]] for row in rows if row["by_position"]), [])
    has_bytes = any(row["bits_per_byte"] is not None for row in rows)
    header = ["run", "model", "size", "reading", "step", "loss", "token loss", *["bits/byte"] * has_bytes, *names]
    lines = []
    for row in rows:
        begin = [row["run"], row["model"], row["size"]]
        if not row["by_position"]:
            lines.append([*begin, "not evaluated", str(row["step"]), *["–"] * (len(header) - 5)])
            continue
        pairs = [
            (row["loss"], row["loss_without_learning"]),
            (row["token_loss"], row["token_loss_without_learning"]),
            *[(row["bits_per_byte"], row["bits_per_byte_without_learning"])] * has_bytes,
            *((part["loss"], part["loss_without_learning"]) for part in row["by_position"]),
        ]
        has_both = row["kind"] == "e2e"
        reading = "learning" if has_both else "no fast weights"
        lines.append([*begin, reading, str(row["step"]), *(number(loss) for loss, _ in pairs)])
        if has_both:
            lines.append(["", "", "", "not learning", "", *(number(without) for _, without in pairs)])
            differences = ("–" if None in pair else number(pair[0] - pair[1], "+.4f") for pair in pairs)
            lines.append(["", "", "", "difference", "", *differences])
    return header, lines


def _notes(rows: Sequence[dict]) -> list[str]:
    """Notes that explain those columns and lines of the first table that it has."""
    parts = {}
    for row in rows:
        for part in row["by_position"]:
            parts.setdefault(part["name"], {})[f"{part['start']} to {part['stop'] - 1}"] = None
    described = [f"{name} {' or '.join(positions)}" for name, positions in parts.items()]
    notes = ["Size: blocks x width, parameters. Losses in nats per token of held-out text; lower is better."]
    if any(row["bits_per_byte"] is not None for row in rows):
        notes.append("Bits/byte: the same in bits for each byte of the text.")
    if len({row["tokenizer"] for row in rows} - {None}) > 1:
        notes.append(
            "The tokenizers differ: these models compare by bits/byte alone, as their tokens and positions are not the "
            "same text."
        )
    if described:
        notes.append(f"Positions in context: {', '.join(described)}.")
    if any(row["loss_without_learning"] is not None for row in rows):
        notes.append(NOT_LEARNING_NOTE)
    notes += [f"{row['run']} diverged: {row['diverged']}." for row in rows if row["diverged"]]
    if any(not row["by_position"] for row in rows):
        notes.append("Not evaluated: ttt-e2e evaluate --workdir=RUN --output=RUN/evaluation, then report again.")
    return notes


# ------------------------------------------------------------------------------------------------------------ the page

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #888; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: 0.25rem 0.7rem 0.25rem 0; text-align: right; }}
th:nth-child(-n+{num_words}), td:nth-child(-n+{num_words}) {{ text-align: left; }}
thead th {{ border-bottom: 2px solid var(--line); }}
tr.run > * {{ border-top: 1px solid var(--line); }}
figure {{ margin: 1rem 0; }}
img {{ width: 100%; height: auto; background: #fff; border-radius: 6px; }}
figcaption, .note {{ color: var(--soft); font-size: 0.9rem; }}
pre {{ overflow-x: auto; font-size: 0.8rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{table}
<p class="note">{note}</p>
{costs}
{plots}
<h2>Configurations</h2>
{configs}
</body>
</html>
"""

COSTS_CAPTION = f"What the models cost. {COSTS_NOTE}"

TRAINING_CAPTION = (
    "Training: loss of each logged step and its running mean (solid), held-out loss (dots); a training loss is that "
    "of the inner learning rate of its step, which may still be warming up, a held-out loss that of the full one."
)


def _page(runs: list[Run], rows: list[dict], figures: dict[str, tuple[bytes, str]]) -> str:
    title = f"Report on {', '.join(run.name for run in runs)}"
    plots = [
        f'<figure><img alt="{html.escape(caption.partition(":")[0])}" src="data:image/png;base64,'
        f'{base64.b64encode(png).decode()}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for png, caption in figures.values()
    ]
    for name, table in _tables(rows).items():
        title_of_table = html.escape(name.replace("_", " ").capitalize())
        note = f'<p class="note">{html.escape(table.note)}</p>'
        plots.append(f"<h2>{title_of_table}</h2>\n{_html_table(table.header, table.lines)}\n{note}")
    costs = _costs(rows)
    configs = [
        f"<details><summary>{html.escape(run.name)}: {row['model']}, {row['size']}</summary>"
        f"<pre>{html.escape(to_json(to_dict(run.config), indent=2))}</pre></details>"
        for run, row in zip(runs, rows)
    ]
    return PAGE.format(
        title=html.escape(title),
        num_words=NUM_WORD_COLUMNS,
        table=_html_table(*_table(rows)),
        note=html.escape(" ".join(_notes(rows))),
        costs=f'{_html_table(costs.header, costs.lines)}\n<p class="note">{html.escape(costs.note)}</p>',
        plots="\n".join(plots),
        configs="\n".join(configs),
    )


def _html_table(header: list[str], lines: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = []
    for line in lines:
        name, *cells = (html.escape(cell) for cell in line)
        begin = '<tr class="run">' if name else "<tr>"
        body.append(f'{begin}<th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    rows_html = "\n".join(body)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows_html}\n</tbody></table></div>'
