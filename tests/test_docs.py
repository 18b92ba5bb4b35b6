"""The documents say what the program does: every field and default, no command or file that does not exist."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.evaluation.conftest import make_run, write_store
from ttt_e2e import cli
from ttt_e2e.config import default_config
from ttt_e2e.errors import UserError
from ttt_e2e.flags import load_config_file, override

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "configuration.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


# ------------------------------------------------------------------------------------------------------- the reference


def test_the_reference_says_what_the_fields_say():
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    text = REFERENCE.read_text(encoding="utf-8")
    assert generator.page(text) == text, "`python docs/make_configuration.py` writes docs/configuration.md anew"
    missing = [name for name in default_config() if f"[{name}](#{name})" not in text]
    assert not missing, f"the table of contents of docs/configuration.md lacks {missing}"


# -------------------------------------------------------------------------------------------------------- command lines


class _ParsedError(Exception):
    """Carries what a command line parsed to, in place of running it."""


@each_document
def test_every_command_line_parses(document, monkeypatch):
    parse = cli.parse

    def stop_after_parse(*args):
        raise _ParsedError(*parse(*args))

    monkeypatch.setattr(cli, "parse", stop_after_parse)
    monkeypatch.chdir(ROOT)
    wrong = []
    for line in _command_lines(document.read_text(encoding="utf-8")):
        try:
            _check_command_line(line)
        except (UserError, ValueError) as error:
            wrong.append(f"{line}\n    {error}")
    assert not wrong, "\n".join([f"{document.relative_to(ROOT)}:", *wrong])


def _command_lines(text: str) -> list[str]:
    """Lines of code blocks that run `ttt-e2e`, without what stands before it on the line."""
    code = "\n".join(block for language, block in FENCE.findall(text) if language in ("", "sh", "bash"))
    return re.findall(r"(?<![\w/.-])(?:\.venv/bin/)?(ttt-e2e .*)$", code.replace("\\\n", " "), re.MULTILINE)


def _check_command_line(line: str) -> None:
    """Raises for an unknown command, an unknown flag, and overrides that the config does not take."""
    _, command, *arguments = shlex.split(line, comments=True)
    if command not in cli.COMMANDS:
        raise UserError(f"unknown command {command!r}; there are {', '.join(cli.COMMANDS)}")
    try:
        cli.COMMANDS[command](arguments)
    except _ParsedError as parsed:
        values, overrides = parsed.args
    if "config" in values:
        # The run directories that the documents speak of are mostly the quickstart's.
        spec = values["config"].value or "configs/quickstart.py"
        if spec.startswith("configs/adapt.py:"):  # its argument names runs of the reader's, too
            spec = "configs/quickstart.py"
        if spec.startswith("configs/"):
            override(load_config_file(spec), overrides)


@each_document
def test_no_document_names_a_command_that_does_not_exist(document):
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/-])ttt-e2e ([a-z]\w*)", text))
    unknown = named - set(cli.COMMANDS)
    assert not unknown, f"{document.name} names {unknown}; there are {', '.join(cli.COMMANDS)}"


@each_document
def test_no_document_names_a_make_target_that_does_not_exist(document):
    text = document.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`(?:[A-Z]+=\S+ )?make ([a-z-]+)", text))
    named |= set(re.findall(r"^make ([a-z-]+)", "".join(block for _, block in FENCE.findall(text)), re.MULTILINE))
    assert named <= targets, f"{document.name} names make {named - targets}; there are {', '.join(sorted(targets))}"


def test_every_command_is_documented():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [command for command in cli.COMMANDS if f"ttt-e2e {command} " not in text]
    assert not missing, f"README.md shows no command line of: {', '.join(missing)}"


# ------------------------------------------------------------------------------------------------------ links and code


@each_document
def test_relative_links_resolve(document):
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)
    broken = []
    for target in targets:
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        resolved = (document.parent / path).resolve() if path else document
        if not resolved.exists():
            broken.append(f"{target}: there is no such file")
        elif anchor and anchor not in _anchors(resolved):
            broken.append(f"{target}: there is no such heading; there are {', '.join(_anchors(resolved))}")
    assert not broken, "\n".join([f"{document.relative_to(ROOT)}:", *broken])


def _anchors(path: Path) -> list[str]:
    """Anchors of a document's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]


@each_document
def test_python_examples_are_python(document):
    for language, block in FENCE.findall(document.read_text(encoding="utf-8")):
        if language == "python":
            ast.parse(block)


@pytest.mark.parametrize("page", ("README.md", "docs/python.md"))
def test_python_examples_run(page, tmp_path, monkeypatch):
    """One after the other, where the quickstart is a tiny run: of random parameters, on random text."""
    write_store(tmp_path / "store", lengths=(4000, 3000))
    workdir = make_run(tmp_path / "runs" / "quickstart", tmp_path / "store")
    fields = json.loads((workdir / "config.json").read_text())
    fields["data"]["train_split"] = "val"
    fields["train"] |= {"global_batch_size": 2}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config(arg):\n    return ConfigDict({fields!r})\n"
    )
    (tmp_path / "ttt_e2e").symlink_to(ROOT / "ttt_e2e")
    monkeypatch.chdir(tmp_path)
    blocks = [block for language, block in FENCE.findall((ROOT / page).read_text("utf-8")) if language == "python"]
    names = {}
    for block in blocks:
        exec(compile(block.replace('"train.num_steps": 100', '"train.num_steps": 2'), page, "exec"), names)
    assert names["model"].load_state(next((tmp_path / "states").iterdir())).position > 1000
