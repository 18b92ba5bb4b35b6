"""No function is longer than 60 lines but for a reason, which stands beside it: `def f():  # long: REASON`.

Ruff counts the parameters (pyproject.toml).
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_LINES = 60
DIRECTORIES = ("ttt_e2e", "launch", "configs", "tests")


def long_functions(source: str) -> list[str]:
    """Names of the functions that are too long and do not say why."""
    lines = source.splitlines()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    too_long = [node for node in functions if node.end_lineno - node.lineno >= MAX_LINES]
    headers = {node.name: "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]) for node in too_long}
    return [name for name, header in headers.items() if not re.search(r"# long: \w", header)]


def test_functions_are_short_or_say_why_not():
    paths = [path for directory in DIRECTORIES for path in sorted((ROOT / directory).rglob("*.py"))]
    names = {f"{path.relative_to(ROOT)}: {name}" for path in paths for name in long_functions(path.read_text())}
    assert not names, f"longer than {MAX_LINES} lines; cut them, or write `# long: REASON` after `def`: {sorted(names)}"


def test_a_long_function_is_seen():
    body = "    pass\n" * MAX_LINES
    assert long_functions(f"def f():\n{body}") == ["f"]
    assert long_functions(f"def f():  # long: a table\n{body}") == []
