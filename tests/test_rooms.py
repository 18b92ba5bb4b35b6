"""Imports between rooms point one way, in the order that docs/architecture.md states and as it draws them.

    python tests/test_rooms.py      writes the drawing anew

A room is a directory of modules, or a file of its own in ttt_e2e/. A directory inside of a room belongs to that room,
unless the order names it too, as PARENT/CHILD.
"""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ttt_e2e"
PAGE = ROOT / "docs" / "architecture.md"
ORDER = re.compile(r"^Imports point one way.*?```\n(.*?)```", re.MULTILINE | re.DOTALL)
DRAWING = re.compile(r"(<!-- drawn by tests/test_rooms.py -->\n).*?(<!-- end of the drawing -->)", re.DOTALL)
# Nearly all rooms import these, which would hide the other arrows.
NOT_DRAWN = ("config", "errors", "strict_json")
LARGEST_SHARE = 0.15


# ------------------------------------------------------------------------------------------------------- from the code


def order(page: str) -> list[list[str]]:
    """Layers of rooms, as the page states them: a room imports only rooms of later layers."""
    return [[room.strip() for room in layer.split(",")] for layer in ORDER.search(page)[1].split("→")]


def modules() -> dict[str, Path]:
    """{"inner/step": its file, ...}; without the package's own __init__ and __main__."""
    paths = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: path for name, path in paths.items() if not name.startswith("__")}


def room_of(name: str, rooms: set[str]) -> str:
    """The room of a module, "config" or "inner/step"; where none of `rooms` holds it, the first part of its name."""
    parts = name.split("/")
    within = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((room for room in within if room in rooms), parts[0])


def imported(source: str) -> list[str]:
    """What a module imports of this package, lazily too: "inner/step/clip_scale", ..."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name.removeprefix("ttt_e2e.").replace(".", "/") for name in names if name.startswith("ttt_e2e.")]


def arrows(rooms: set[str]) -> dict[tuple[str, str], list[str]]:
    """{(a room, a room that it imports): the modules that do}."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, path in modules().items():
        for other in imported(path.read_text(encoding="utf-8")):
            pair = room_of(name, rooms), room_of(other, rooms)
            if pair[0] != pair[1]:
                found.setdefault(pair, []).append(name)
    return found


def line_counts(rooms: set[str]) -> Counter:
    """Lines of each room."""
    counts = Counter()
    for name, path in modules().items():
        counts[room_of(name, rooms)] += path.read_text(encoding="utf-8").count("\n")
    return counts


def draw(layers: list[list[str]]) -> str:
    """A Mermaid graph of the rooms, without the arrows that a way over other rooms says already."""
    rooms = {room for layer in layers for room in layer} - set(NOT_DRAWN)
    pairs = {pair for pair in arrows(rooms | set(NOT_DRAWN)) if rooms.issuperset(pair)}
    reached: dict[str, set[str]] = {}  # from the last layer up: what a room imports, over others too
    lines = []
    for room in reversed([room for layer in layers for room in layer if room in rooms]):
        below = {b for a, b in pairs if a == room}
        indirect = set().union(*(reached[other] for other in below))
        reached[room] = below | indirect
        lines[:0] = [f"  {room} --> {other}" for layer in layers for other in layer if other in below - indirect]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```", ""])


# --------------------------------------------------------------------------------------------------------------- tests


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_every_room_is_in_the_order_and_in_the_tables():
    stated = {room for layer in order(page()) for room in layer}
    rooms = {room_of(name, stated) for name in modules()}
    assert stated == rooms, f"docs/architecture.md states an order of {sorted(stated)}; there are {sorted(rooms)}"
    listed = re.findall(r"^  (\w+)(?:/|\.py) ", page().split("\n## Rooms\n")[1].split("\n## ")[0], re.MULTILINE)
    top = {room.split("/")[0] for room in rooms}
    assert set(listed) == top, f"docs/architecture.md lists {sorted(listed)}; there are {sorted(top)}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## What is where\n")[1].split("\n## ")[0]
    directories = {room for room in top if (PACKAGE / room).is_dir()}
    assert directories <= set(re.findall(r"`ttt_e2e/(\w+)/", readme)), "README.md, What is where, lacks a room"


def test_imports_point_one_way():
    layers = order(page())
    place = {room: number for number, layer in enumerate(layers) for room in layer}
    wrong = {pair: names for pair, names in arrows(set(place)).items() if place[pair[0]] >= place[pair[1]]}
    assert not wrong, f"imports against the order in docs/architecture.md: {wrong}"


def test_no_room_is_too_large():
    counts = line_counts({room for layer in order(page()) for room in layer})
    shares = {room: count / counts.total() for room, count in counts.items()}
    large = {room: f"{share:.1%}" for room, share in shares.items() if share > LARGEST_SHARE}
    assert not large, f"rooms above {LARGEST_SHARE:.0%} of the lines: {large}"


def test_the_drawing_is_what_the_code_does():
    drawn = DRAWING.search(page())
    assert drawn, "docs/architecture.md has no drawing"
    assert drawn[0] == f"{drawn[1]}{draw(order(page()))}{drawn[2]}", "stale: run `python tests/test_rooms.py`"


def test_lazy_imports_and_circles_are_seen():
    source = "def f():\n    import ttt_e2e.train.loop\n    from ttt_e2e.inner.step import clip_scale\n"
    assert imported(source) == ["train/loop", "inner/step/clip_scale"]
    assert room_of("kernels/attention/tpu/x", {"kernels", "kernels/attention"}) == "kernels/attention"
    assert room_of("train/optimizers/muon", {"train"}) == "train"


if __name__ == "__main__":
    text = page()
    PAGE.write_text(DRAWING.sub(lambda m: f"{m[1]}{draw(order(text))}{m[2]}", text), encoding="utf-8")
