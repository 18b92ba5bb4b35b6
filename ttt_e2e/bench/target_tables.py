"""Tables and a plot from many results of `bench target`: configurations on slices, and comparisons of models.

The results are in directories CONFIG@TARGET@MESH (launch/targets.py); CONFIG is SIZE-KIND-CONTEXT.
"""

from pathlib import Path

from ttt_e2e.bench import table
from ttt_e2e.errors import UserError
from ttt_e2e.figures import COLORS, STYLE, make_figure, require_matplotlib
from ttt_e2e.runs.files import parse_json, read_text, replace_text, replacing
from ttt_e2e.targets.bound import SHARE

GIB = 2**30
HOURS = f"device_hours_at_{SHARE:.0%}_of_bound"
# GPU-hours of a public reproduction of two configurations on 8 H200s.
REPRODUCED = {"125m-e2e-8k": 24.2, "125m-full-8k": 19.1}
CONTEXTS = {"8k": 8_192, "32k": 32_768, "128k": 131_072}
LINES = {"e2e": "-", "full": "--"}


def write(directory) -> str:
    """Writes `tables.md` and `targets.png` of all results in a directory; returns the tables as Markdown.

    Raises:
      UserError: there are no results, or matplotlib is not installed.
    """
    require_matplotlib()
    directory = Path(directory)
    rows = read(directory)
    text = tables(rows)
    replace_text(directory / "tables.md", text)
    with replacing(directory / "targets.png") as file:
        figure(rows).savefig(file, format="png", dpi=150)
    return text


def read(directory: Path) -> list[dict]:
    """Reads the training-step rows of all results, one for each config and accelerator, with `config` added.

    It is the row of the smallest slice that fits; if none fits, of the largest slice tried.

    Raises:
      UserError: the directory holds no results.
    """
    candidates = {}
    for path in sorted(directory.glob("*@*@*/results.json")):
        row = parse_json(read_text(path), path)[0] | {"config": path.parent.name.partition("@")[0]}
        row["num_devices"] = _product(row["mesh"])
        candidates.setdefault((row["config"], row["target"].partition(":")[0]), []).append(row)
    if not candidates:
        raise UserError(f"{directory} holds no results of bench target: directories CONFIG@TARGET@MESH")

    def best(rows):
        fitting = [row for row in rows if row["fits"]]
        return min(fitting, key=_size) if fitting else max(rows, key=_size)

    return sorted(map(best, candidates.values()), key=lambda row: (row["target"][:2], *_order(row["config"])))


def tables(rows: list[dict]) -> str:
    """Markdown tables: all rows; learning models against full attention; the bound against a public reproduction."""
    parts = [table.markdown([_line(row) for row in rows])]
    if pairs := [line for row in rows if (line := _pair(row, rows))]:
        parts += ["Learning beside full attention:", table.markdown(pairs)]
    if reproduced := [_reproduced(row) for row in rows if _is_reproduced(row)]:
        parts += ["Beside a public reproduction:", table.markdown(reproduced)]
    return "\n\n".join(parts) + "\n"


def figure(rows: list[dict]):
    """A plot of tokens a second of a device at the bound, and of device-hours of the recipe, by context length."""
    import matplotlib

    rows = [row for row in rows if row["fits"] and row["target"].startswith("h100")]
    with matplotlib.rc_context(STYLE):
        drawn = make_figure(figsize=(9, 4))
        speed, hours = drawn.subplots(1, 2)
        sizes = list(dict.fromkeys(row["config"].split("-")[0] for row in rows))
        for (size, color), (kind, style) in ((s, k) for s in zip(sizes, COLORS) for k in LINES.items()):
            curve = [row for row in rows if row["config"].startswith(f"{size}-{kind}-")]
            contexts = [CONTEXTS[row["config"].split("-")[2]] for row in curve]
            look = {"color": color, "linestyle": style, "marker": "o", "markersize": 4, "label": f"{size} {kind}"}
            speed.plot(contexts, [row["tokens_per_second_at_bound"] / row["num_devices"] for row in curve], **look)
            hours.plot(contexts, [row[HOURS] for row in curve], **look)
        speed.set(title="Tokens per second and H100, at the bound", xlabel="context (tokens)", yscale="log")
        hours.set(
            title=f"H100-hours of the recipe, at {SHARE:.0%} of the bound", xlabel="context (tokens)", yscale="log"
        )
        for panel in (speed, hours):
            panel.set_xscale("log", base=2)
            panel.set_xticks(list(CONTEXTS.values()), list(CONTEXTS))
        handles, labels = hours.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=5)  # beside the lines, not on them
        return drawn


def _line(row: dict) -> dict:
    """A row's line in the table of all rows, bytes in GiB and FLOPs in TFLOP."""
    line = {"config": row["config"], "target": row["target"], "mesh": row["mesh"], "batch": row["batch"]}
    line |= {"accumulation": row["accumulation_steps"], "fits": "yes" if row["fits"] else "no"}
    if "refused" in row:
        return line | {"fits": "refused"}
    over = row["received_bytes_by_axis"]
    return line | {
        "needed, GiB": row["needed_bytes"] / GIB,
        "state": row["state_bytes"] / GIB,
        "temporaries": row["temp_bytes"] / GIB,
        "received, GiB": row["received_bytes"] / GIB,
        "over data": over.get("data", 0) / GIB,
        "over model": over.get("model", 0) / GIB,
        "TFLOP": row["flops"] / 1e12,
        "useless, %": 100 * row["useless_share"],
        "bound, s": row["bound_seconds"],
        "binds": row["binds"],
        "tokens/s": row["tokens_per_second_at_bound"],
        "device-hours": row["device_hours_at_bound"],
        f"device-hours at {SHARE:.0%}": row[HOURS],
    }


def _pair(row: dict, rows: list[dict]) -> dict | None:
    """Compares a learning model to full attention of the same size, context and accelerator; None if one is missing."""
    size, kind, context = row["config"].split("-")
    same = (f"{size}-full-{context}", row["target"].partition(":")[0])
    others = [r for r in rows if (r["config"], r["target"].partition(":")[0]) == same]
    if kind != "e2e" or not row["fits"] or not others or not others[0]["fits"]:
        return None
    other = others[0]
    return {
        "size": size,
        "context": context,
        "e2e on": row["target"],
        "full on": other["target"],
        f"e2e, device-hours at {SHARE:.0%}": row[HOURS],
        f"full, device-hours at {SHARE:.0%}": other[HOURS],
        "e2e / full": row[HOURS] / other[HOURS],
    }


def _is_reproduced(row: dict) -> bool:
    return row["config"] in REPRODUCED and row["target"] == "h200:8" and row["fits"]


def _reproduced(row: dict) -> dict:
    """Compares a row's device-hours to those of the public reproduction."""
    measured = REPRODUCED[row["config"]]
    return {
        "config": row["config"],
        "reproduction, H200-hours": measured,
        "bound, H200-hours": row["device_hours_at_bound"],
        f"at {SHARE:.0%}": row[HOURS],
        "bound / reproduction, %": 100 * row["device_hours_at_bound"] / measured,
    }


def _order(config: str) -> tuple:
    """Sort key of a config's name: by size, context, kind."""
    size, kind, context = config.split("-")
    return float(size.rstrip("mb")) * (1000 if size.endswith("b") else 1), CONTEXTS[context], kind


def _size(row: dict) -> int:
    return row["num_devices"]


def _product(mesh: str) -> int:
    """Number of devices of a mesh such as "8x2"."""
    data, model = mesh.split("x")
    return int(data) * int(model)
