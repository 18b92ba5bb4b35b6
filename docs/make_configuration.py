"""Writes what docs/configuration.md says of each field, from what the fields say (ttt_e2e/config/sections.py).

    python docs/make_configuration.py

What stands between `<!-- ...: made by ... -->` and `<!-- end -->` is made; the rest of the page is written by hand.
"""

import dataclasses
import textwrap
from pathlib import Path

from ttt_e2e.config import Config, default_config
from ttt_e2e.config.fields import BOUNDS, FREE, LOGGED, REFUSED
from ttt_e2e.config.sections import MIXER_FILES, MIXER_SECTIONS

PAGE = Path(__file__).parent / "configuration.md"
WIDTH = 120


def page(text: str) -> str:
    """The text of the page with its made parts written anew."""
    for name, make in (("fields", fields), ("resume rules", resume_rules)):
        begin, end = f"<!-- {name}: made by docs/make_configuration.py -->\n", "<!-- end -->\n"
        before, marks, rest = text.partition(begin)
        _, more_marks, after = rest.partition(end)
        assert marks and more_marks, f"{PAGE} has no lines {begin!r} and {end!r}"
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


def fields() -> str:
    """Every section: what it is, and an entry for each field."""
    parts = []
    for name, section in _sections().items():
        entries = "".join(_entry(f) for f in _fields(section))
        parts.append(f"### {name}\n\n{_introduction(section)}\n\n{entries}")
    return "\n".join(parts)


def resume_rules() -> str:
    """A table of the fields of each section by what a resumed run does with a change of them."""
    rows = ["| section | a change is refused | logged | free |", "|---|---|---|---|"]
    for name, section in _sections().items():
        by_rule = {rule: [] for rule in (REFUSED, LOGGED, FREE)}
        for f in _fields(section):
            by_rule[f.metadata["resume"]].append(f"`{f.name}`")
        most = max(by_rule, key=lambda rule: len(by_rule[rule]))
        others = "the others" if sum(map(bool, by_rule.values())) > 1 else "all"
        cells = [others if rule == most else ", ".join(names) or "-" for rule, names in by_rule.items()]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _sections() -> dict[str, object]:
    """All sections with their defaults, by name; those in `model`, `model.NAME`, come after it."""
    default_config()  # imports the mixers, which declare them
    of_mixers = {f"model.{mixer}": MIXER_SECTIONS[mixer]() for mixer in MIXER_FILES if mixer in MIXER_SECTIONS}
    (_, model), *others = vars(Config()).items()
    return {"model": model, "model.engram": model.engram} | of_mixers | dict(others)


def _fields(section) -> list[dataclasses.Field]:
    """The fields of a section that have an entry."""
    return [f for f in dataclasses.fields(section) if "help" in f.metadata]


def _introduction(section) -> str:
    """The paragraphs of a section's docstring."""
    return "\n\n".join(_wrapped(" ".join(part.split())) for part in type(section).__doc__.split("\n\n"))


def _entry(f) -> str:
    default = f'"{f.default}"' if isinstance(f.default, str) else repr(f.default)
    legal = _legal(f)
    text = f"- `{f.name}` ({type(f.default).__name__}, `{default}`): {f.metadata['help']}{' ' if legal else ''}{legal}"
    return _wrapped(text, subsequent_indent="  ") + "\n"


def _legal(f) -> str:
    """A sentence on the range or the choices of a field; "" where its type says it all."""
    bounds, choices = f.metadata["bounds"], f.metadata["choices"]
    if choices:
        return "One of " + ", ".join(f'`"{choice}"`' for choice in choices) + "."
    text = ", ".join(f"{BOUNDS[key][0]} {_number(bound)}" for key, bound in bounds.items())
    if not all(BOUNDS[key][1](f.default, bound) for key, bound in bounds.items()):
        text = f"{f.default}, or {text}"
    return text and f"{text[0].upper()}{text[1:]}."


def _number(value) -> str:
    bits = value.bit_length() if isinstance(value, int) else 0
    return f"2**{bits} - 1" if bits > 8 and value == 2**bits - 1 else str(value)


def _wrapped(text: str, **more) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False, **more)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
