"""docs/when_it_fails.md quotes messages as the code has them; "…" stands for what differs from case to case."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "when_it_fails.md"
CONVERSION = re.compile(r"%[-+.\d]*[a-z]")  # of a message for `logging`


def texts_of(source: str) -> set[str]:
    """All strings of a module, with "…" in place of what is formatted into them."""
    texts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
            texts.add("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(CONVERSION.sub("…", node.value))
    return texts


def quoted(page: str) -> list[str]:
    """The messages that the page quotes: the lines of its blocks of code."""
    blocks = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.split("\n") if line]


TEXTS = set().union(*(texts_of(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "ttt_e2e").rglob("*.py"))))
MESSAGES = quoted(PAGE.read_text(encoding="utf-8"))


def occurs(message: str) -> bool:
    return any(message in text for text in TEXTS)


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_is_one_of_the_code(message):
    assert occurs(message), f"docs/when_it_fails.md quotes {message!r}, which no string of ttt_e2e/ has"


def test_there_are_twenty_and_each_has_a_cause_and_a_remedy():
    assert len(MESSAGES) == len(set(MESSAGES)) >= 20
    _, *texts = re.split(r"^```\n.*?^```\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(texts) == len(MESSAGES)
    assert all("Cause:" in text and "Remedy:" in text for text in texts)


def test_a_message_that_was_changed_is_seen():
    assert not occurs(MESSAGES[0] + " now")
    assert texts_of('raise E(f"{a} is {b:.1f}, not " "c")\nlog("%s of %.2f", x)') >= {"… is …, not c", "… of …"}
