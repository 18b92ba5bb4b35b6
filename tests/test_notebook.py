"""The notebooks run, from the first cell to the last, on a run of the name that they load.

    python tests/test_notebook.py      runs them on runs/quickstart (`make train`), and stores what they show

Jupyter is not needed: a cell is executed as Python, its output is what it prints, draws, or has as its last expression.
"""

import ast
import base64
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.evaluation.conftest import make_run, write_store

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MAX_BYTES = 200_000


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(notebook: dict) -> list[list[dict]]:
    """Runs the code cells in one namespace; returns the outputs of each, as the notebook format has them."""
    names = {"__name__": "__main__"}
    return [run_cell("".join(cell["source"]), names, count) for count, cell in enumerate(code_cells(notebook), 1)]


def run_cell(source: str, names: dict, count: int) -> list[dict]:
    body, last, printed, value = ast.parse(source), None, io.StringIO(), None
    if body.body and isinstance(body.body[-1], ast.Expr):
        last = ast.Expression(body.body.pop().value)
    with redirect_stdout(printed):
        exec(compile(body, f"cell {count}", "exec"), names)
        if last:
            value = eval(compile(last, f"cell {count}", "eval"), names)
    outputs = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(True)})
    if value is not None:
        data = {"data": {"text/plain": repr(value).splitlines(True)}, "metadata": {}}
        outputs.append({"output_type": "execute_result", "execution_count": count, **data})
    return outputs + [{"output_type": "display_data", "data": {"image/png": png}, "metadata": {}} for png in figures()]


def figures() -> list[str]:
    """The figures that a cell has drawn, as PNG in base64; closes them."""
    from matplotlib import pyplot

    pngs = []
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png", dpi=100, metadata={"Software": None})
        pyplot.close(number)
        pngs.append(base64.b64encode(file.getvalue()).decode())
    return pngs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    write_store(tmp_path / "store")
    make_run(tmp_path / "runs" / "quickstart", tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    notebook = read(path)
    kinds = [[output["output_type"] for output in outputs] for outputs in run_cells(notebook)]
    stored = [[output["output_type"] for output in cell["outputs"]] for cell in code_cells(notebook)]
    assert kinds == stored, "stale: run `python tests/test_notebook.py`"
    with pytest.raises(ZeroDivisionError):
        run_cells({"cells": [{"cell_type": "code", "source": ["1 / 0"]}]})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_shows_its_outputs_and_is_small(path):
    cells = code_cells(read(path))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", ()) for cell in cells for output in cell["outputs"])
    assert path.stat().st_size < MAX_BYTES


if __name__ == "__main__":
    import os

    import matplotlib

    matplotlib.use("Agg")
    os.chdir(ROOT)
    for path in NOTEBOOKS:
        notebook = read(path)
        for count, (cell, outputs) in enumerate(zip(code_cells(notebook), run_cells(notebook)), 1):
            cell |= {"execution_count": count, "outputs": outputs}
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
