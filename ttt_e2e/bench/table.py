"""Writes a benchmark's results: its rows as JSON and as a Markdown table, and the environment it ran in."""

import os
import platform

import jax
from etils import epath

from ttt_e2e.outputs import writing
from ttt_e2e.runs.files import replace_text
from ttt_e2e.strict_json import to_json


def write(output, rows: list[dict], title: str, notes: str = "", shown: list[dict] | None = None) -> str:
    """Writes `results.json`, `environment.json` and `results.md` into a directory; returns the Markdown.

    notes: text below the table. shown: the rows of the table, if not `rows`.
    """
    directory = epath.Path(output)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    machine = environment()
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = "\n\n".join(filter(None, (f"# {title}", markdown(shown or rows), notes, facts))) + "\n"
    replace_text(directory / "results.json", to_json(rows, indent=2) + "\n")
    replace_text(directory / "environment.json", to_json(machine, indent=2) + "\n")
    replace_text(directory / "results.md", text)
    return text


def environment() -> dict:
    """Describes the machine and the software that the figures were measured with."""
    return {
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def markdown(rows: list[dict]) -> str:
    """A Markdown table with a column for every key of any row, in the order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)] + [[_text(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
