"""What the fuzz tests share: how examples are drawn, and what a command may answer."""

import contextlib
import io

from hypothesis import HealthCheck, settings

from ttt_e2e.cli import main


def fuzz(max_examples: int) -> settings:
    """The same examples in every run; a database of failures would make runs differ."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=max_examples, derandomize=True, database=None, deadline=None, suppress_health_check=slow
    )


def refusal(*argv) -> str:
    """Runs a command in this process: the one line with which it refuses bad input, "" where it takes it."""
    stderr, stdout = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
        code = main([str(argument) for argument in argv])
    if code == 0:
        return ""
    lines = [line for line in stderr.getvalue().split("\n") if line and "%|" not in line]
    assert code == 2, (code, lines)
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ") and len(lines[0]) > len("error: "), lines
    return lines[0]
