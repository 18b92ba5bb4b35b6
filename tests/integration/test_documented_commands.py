"""The command lines of README and tutorial run as they are written, on a quickstart of two steps."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.test_docs import FENCE

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )?(?:ttt-e2e|python launch/sweep.py) .*$", re.MULTILINE)
# Models for accelerators, one that is downloaded, and a benchmark of an hour.
LEFT_OUT = ("configs/paper.py", "qwen3", "bench latency")
# What `make train` and the tutorial make of what README names.
MADE_BEFORE = {
    "README.md": (
        "ttt-e2e prepare --input=stdlib --tokenizer=train:512 --output=data/stdlib",
        "ttt-e2e train --config=configs/quickstart.py --workdir=runs/quickstart",
        "ttt-e2e train --config=configs/quickstart.py:window --workdir=runs/window",
    ),
    "docs/tutorial.md": (),
}
SHORTER = {"num_steps=300": "num_steps=2", "warmup_steps=30": "warmup_steps=1"}
LONGER = {"num_steps=1000": "num_steps=3", "decay_steps=1000": "decay_steps=3"}


@pytest.mark.slow
@pytest.mark.parametrize("document", MADE_BEFORE)
def test_documented_commands_run(document, tmp_path):
    make_checkout(tmp_path)
    failed = []
    for line in (*MADE_BEFORE[document], *command_lines((ROOT / document).read_text(encoding="utf-8"))):
        done = subprocess.run(
            replaced(line, LONGER), shell=True, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
        )
        if done.returncode:
            failed.append(f"{line}\n    {done.stderr[-600:]}")
    assert not failed, "\n".join(failed)


def command_lines(text: str) -> list[str]:
    """Command lines of the code blocks, each on one line."""
    code = "\n".join(block for language, block in FENCE.findall(text) if not language).replace("\\\n", " ")
    return [line for line in COMMAND.findall(code) if not any(words in line for words in LEFT_OUT)]


def make_checkout(directory: Path) -> None:
    """Fills a directory with what the lines name: a shorter quickstart, the launchers, some text, the program."""
    (directory / "configs").mkdir()
    quickstart = replaced((ROOT / "configs/quickstart.py").read_text(encoding="utf-8"), SHORTER)
    (directory / "configs/quickstart.py").write_text(quickstart, encoding="utf-8")
    (directory / "launch").symlink_to(ROOT / "launch")
    (directory / "texts").mkdir()
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-p]*.py"))
    for source in sources:
        (directory / "texts" / f"{source.stem}.txt").write_bytes(source.read_bytes())
    (directory / "texts/long.py").write_bytes(sources[0].read_bytes())
    (directory / "bin").mkdir()
    for name, arguments in (("ttt-e2e", "-m ttt_e2e"), ("python", "")):
        program = directory / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        program.chmod(0o755)


def environment(directory: Path) -> dict[str, str]:
    """That of a user: the programs of `make_checkout`, and none of the flags that tests are compiled under."""
    path = f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}


def replaced(text: str, by: dict[str, str]) -> str:
    """The text with each key replaced by its value."""
    for old, new in by.items():
        text = text.replace(old, new)
    return text
