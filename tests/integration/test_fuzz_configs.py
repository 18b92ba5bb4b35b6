"""Configs of all kinds of nonsense: each is refused in one line, or is one that a training step can be made of."""

import contextlib
import json
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.integration.fuzzing import fuzz, mutate, mutations, refusal
from tests.tiny_run import tiny_run
from ttt_e2e.cluster.mesh import make_mesh, shardings
from ttt_e2e.config import Config, default_config, to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.runs import read_runs
from ttt_e2e.model import abstract_model
from ttt_e2e.runs import directory as run_directory
from ttt_e2e.runs.metrics import MetricsWriter
from ttt_e2e.train import loop
from ttt_e2e.train.optimizers import make_optimizer
from ttt_e2e.train.steps import init_state, make_train_step

FIELDS = sorted(f"{section}.{name}" for section, fields in default_config().items() for name in fields)
FIELDS += sorted(f"model.engram.{name}" for name in default_config().model.engram)
WORDS = (
    *("", " ", "true", "false", "None", "[]", "{}", "()", "1,2", "1e3", "0x10", "1_000", "½", "-", "--", "\0", "\n"),
    *("nan", "inf", "-inf", "1e309", "1e-320", "-0.0", "0.1", "1.5", "1e-8", "9" * 5000),
    *("window", "attention", "window,attention", "attention,", ",", "window,,window", "half", "interleaved", "int8"),
    *("float32", "bfloat16", "float16", "float64", "exact", "reference", "first_order", "store", "delta", "segment"),
    *("auto", "keep", "block", "mini_batch", "^fast", "(", "(?P<", ".*", "val", "train", "../train", "zarr.json"),
    *("nowhere", "/dev/null", "/", ".", "gs://", "x://y", "file:///", "a\nb", "\u202e", "🙂" * 50, "x" * 5000),
)
LARGE = (2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63, 10**19, 10**40, -(2**63))


# ------------------------------------------------------------------------------------------------- what is tried
def mistyped(name: str):
    """Names that are nearly that of a field."""
    return st.one_of(
        st.integers(0, len(name) - 1).map(lambda i: name[:i] + name[i + 1 :]),
        st.sampled_from((name.upper(), name.partition(".")[0], f"{name}.x", f"{name}[0]", f".{name}", name + " ", "")),
        st.text(max_size=6),
    )


def names():
    """Mostly fields."""
    known = st.sampled_from(FIELDS)
    return st.one_of(known, known, known, known, known, known, known, known.flatmap(mistyped))


def texts():
    """Values as they are typed."""
    small, large = st.integers(-2, 40).map(str), st.sampled_from(LARGE).map(str)
    return st.one_of(small, small, small, large, st.floats().map(repr), st.sampled_from(WORDS), st.text(max_size=6))


def overrides():
    """A command line's `--config.section.field=value`, some without the `=`."""
    pairs = st.tuples(names(), st.sampled_from(("=",) * 12 + ("", "==")), texts())
    return st.lists(pairs.map(lambda parts: f"--config.{''.join(parts)}"), min_size=1, max_size=4)


def json_values():
    """Values of every type that JSON has."""
    plain = st.one_of(
        *(st.none(), st.booleans(), st.integers(-2, 40), st.sampled_from(LARGE), st.floats(), st.sampled_from(WORDS)),
        st.text(max_size=6),
    )
    return st.one_of(plain, plain, st.lists(plain, max_size=2), st.dictionaries(st.text(max_size=4), plain, max_size=2))


# ---------------------------------------------------------------------------------------------- what is made of it
class Reached(Exception):
    """The config was taken: all that `train` checks before it makes or restores a state."""


@pytest.fixture(scope="module")
def place(token_store, tmp_path_factory):
    """A directory with a config file of a tiny run."""
    directory = tmp_path_factory.mktemp("configs")
    fields = to_dict(tiny_run(token_store))
    fields["model"]["engram"] = {"table_size": 5, "num_heads": 2, "head_dim": 3}
    for section, derived in (
        ("model", "head_dim num_key_value_heads fast_intermediate_size"),
        ("optimizer", "decay_steps"),
    ):
        for name in derived.split():
            fields[section][name] = 0
    (directory / "config.py").write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({fields!r})\n"
    )
    (directory / "fields.json").write_text(json.dumps(fields))
    return directory


@contextlib.contextmanager
def stopped():
    """Commands stop where their checks are done; the list that this gives has the configs that they took."""
    taken = []

    def stop(config, *_, **__):
        taken.append(config)
        raise Reached

    with (
        mock.patch.object(loop, "restore_or_init", stop),
        mock.patch.object(run_directory, "_git", lambda *_: ""),
        mock.patch("ttt_e2e.evaluation.token_losses.evaluate", stop),
        mock.patch("ttt_e2e.inference.generate.generate", stop),
        contextlib.suppress(Reached),
    ):
        yield taken


def outcome(*argv) -> tuple[str, Config | None]:
    """The line that refuses a command of `train`, or the config that it takes."""
    line = ""
    with stopped() as taken:
        line = refusal("train", *argv)
    assert bool(line) != bool(taken)  # nothing is trained
    return line, taken[0] if taken else None


def make_shapes(config: Config, *, step: bool) -> None:
    """The shapes of the run's state and of a training step; computes nothing."""
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, abstract_model(config.model)[1], config.model)
    state = jax.eval_shape(lambda: init_state(config, optimizer))
    placed = shardings(state, mesh, config.model)
    if not step:
        return
    tokens = jax.ShapeDtypeStruct((config.train.global_batch_size, config.train.seq_len + 1), jnp.int32)
    after, metrics = jax.eval_shape(make_train_step(config, optimizer, mesh, placed), state, tokens)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()


def check_command(arguments: list[str], place: Path, *, step: bool) -> None:
    workdir = place / "run"
    _, config = outcome(f"--config={place / 'config.py'}", f"--workdir={workdir}", *arguments)
    if config:
        make_shapes(config, step=step)
        shutil.rmtree(workdir)
    assert not workdir.exists()


# ------------------------------------------------------------------------------------------------- the command line
@fuzz(40)
@given(arguments=overrides())
@example(arguments=["--config.\n=0"])  # a name that would break the line
@example(arguments=["--config.model.head_dim=4611686018427387904"])  # sizes whose product no array can have
def test_overrides_are_refused_in_one_line_or_legal(arguments, place):
    check_command(arguments, place, step=False)


@pytest.mark.slow
@fuzz(400)
@given(arguments=overrides())
def test_many_overrides(arguments, place):
    check_command(arguments, place, step=True)


# -------------------------------------------------------------------------------------------------- really trained
TINY = {
    "model.num_hidden_layers": (1, 2, 3, 4),
    "model.num_fast_blocks": (0, 1, 2, 3),
    "model.num_attention_heads": (1, 2, 4, 8),
    "model.num_key_value_heads": (0, 1, 2),
    "model.head_dim": (0, 2, 6, 16),
    "model.sliding_window": (0, 1, 7, 32, 1000),
    "model.mixer": ("", "window", "attention", "window,attention"),
    "model.compute_dtype": ("float32", "bfloat16", "float16", "float64"),
    "model.param_dtype": ("float32", "bfloat16", "float16", "float64"),
    "model.initializer_range": (0.0, 1e-30, 1e30),
    "model.rms_norm_eps": (1e-30, 1e30),
    "model.rope_theta": (1e-30, 1.0, 1e30),
    "model.engram.blocks": ("0", "2,0"),
    "inner.mini_batch_size": (1, 4, 16, 32),
    "inner.gradient": ("exact", "reference", "first_order"),
    "inner.trajectory": ("auto", "store", "delta", "segment"),
    "inner.segment_length": (0, 1, 2, 4, 3),
    "inner.remat": ("auto", "keep", "mini_batch", "block"),
    "inner.truncate": (0, 1, 3, 100),
    "inner.memory_budget_bytes": (1, 2**62),
    "inner.learning_rate": (0.0, 1e30),
    "inner.clip_norm": (0.0, 1e-30),
    "train.accumulation_steps": (1, 2, 4, 8),
    "train.seed": (2**32 - 1,),
    "optimizer.learning_rate": (0.0, 1e30),
    "optimizer.b1": (0.0,),
    "optimizer.clip_norm": (0.0, 1e-30),
    "optimizer.train_only": ("", "fast", "norm", "engram", "."),
    "data.seed": (2**32 - 1,),
    "data.bos_id": (0, 1),
    "mesh.data": (0, 1, 2, 8),
    "mesh.model": (1, 2, 3),
    "eval.batch_size": (1, 8),
    "eval.num_sequences": (0, 1, 7),
    "checkpoint.keep_every": (1, 2),
    "log.profile_steps": (1,),
}


def tiny_overrides():
    """Of a few fields, values that are legal by themselves."""
    return st.lists(st.sampled_from(sorted(TINY)), min_size=1, max_size=5, unique=True).flatmap(
        lambda names: st.tuples(*(st.sampled_from(TINY[name]).map(f"--config.{name}={{}}".format) for name in names))
    )


def check_training(arguments: tuple[str, ...], place: Path) -> str:
    workdir = place / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    two_steps = ("--config.train.num_steps=2", "--config.optimizer.warmup_steps=1", "--config.eval.every_steps=1")
    return refusal("train", f"--config={place / 'config.py'}", f"--workdir={workdir}", *two_steps, *arguments)


@pytest.mark.slow
@fuzz(15)
@given(arguments=tiny_overrides())
def test_what_is_legal_can_be_trained(arguments, place):
    check_training(arguments, place)


# ----------------------------------------------------------------------------------------------------- config files
PROGRAMS = (
    *("", "def", "get_config = 3", "raise ValueError", "1 / 0", "import nowhere_at_all", "x = '\\ud800'", "\0", "\xff"),
    *("raise SystemExit(0)", "import sys; sys.exit('no')", "def get_config(a, b): pass", "class get_config: pass"),
    *("def get_config(): return None", "def get_config(): return {}", "def get_config(): return {'model': {}}"),
    *("def get_config(): return [1]", "def get_config(): return get_config()", "def get_config(): yield 1"),
    *(
        "def get_config(): raise KeyError('a\\nb')",
        "def get_config(): raise SystemExit(3)",
        "async def get_config(): 3",
    ),
    "from ttt_e2e.errors import UserError\ndef get_config(): raise UserError('two\\nlines')",
    "def get_config(): assert False",
)
EXPRESSIONS = (
    *("None", "(1, 2)", "{1}", "lambda: 3", "object()", "b'8'", "1j", "range(3)", "[8]", "{}", "True", "'8'", "8.0"),
    *("10**5000", "-(10**5000)", "float('nan')", "__import__('numpy').int64(8)", "__import__('numpy').ones(3)"),
    "__import__('ml_collections').config_dict.placeholder(int)",
)


def files():
    """The text of config files."""
    edits = st.tuples(names(), st.one_of(json_values().map(repr), st.sampled_from(EXPRESSIONS)))
    edits = st.tuples(edits, st.sampled_from(("set", "set", "drop", "section"))).map(
        lambda edit: f"    edit({edit[1]!r}, {edit[0][0]!r}, {edit[0][1]})\n"
    )
    return st.one_of(st.lists(edits, min_size=1, max_size=3).map("".join), st.sampled_from(PROGRAMS))


HEADER = """
import json, pathlib
from ml_collections import ConfigDict
nan, inf = float("nan"), float("inf")

def get_config(arg=""):
    fields = json.loads(pathlib.Path({path!r}).read_text())
    def edit(kind, name, value):
        section, _, field = name.partition(".")
        if kind == "section":
            fields[section] = value
        elif isinstance(fields.setdefault(section, {{}}), dict):
            if kind == "set":
                fields[section][field] = value
            else:
                fields[section].pop(field, None)
{edits}
    return ConfigDict(fields)
"""


def check_file(text: str, place: Path) -> None:
    if text.startswith("    edit"):
        text = HEADER.format(path=str(place / "fields.json"), edits=text)
    file, workdir = place / "fuzzed.py", place / "run"
    file.write_bytes(text.encode("utf-8", "surrogatepass") if text != "\xff" else b"\xff")
    _, config = outcome(f"--config={file}", f"--workdir={workdir}")
    if config:
        make_shapes(config, step=False)
        shutil.rmtree(workdir)
    assert not workdir.exists()


@fuzz(30)
@given(text=files())
@example(text="def get_config(): return {}")
@example(text="def get_config(): raise SystemExit(3)")
def test_config_files_are_refused_in_one_line_or_legal(text, place):
    check_file(text, place)


@pytest.mark.slow
@fuzz(150)
@given(text=files())
def test_many_config_files(text, place):
    check_file(text, place)


# ------------------------------------------------------------------------------------------------- a run's own files
RUN_FILES = ("config.json", "config.json", "config.json", "metrics.jsonl", "starts.jsonl")


@pytest.fixture(scope="module")
def run(place, token_store):
    """A run directory of three steps, without a checkpoint."""
    config, workdir = tiny_run(token_store), place / "whole"
    run_directory.write_config(workdir, config)
    lines = [json.dumps({"step": step, "loss": 3.0 - step, "eval_loss": 3.0}) for step in (1, 2, 3)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (workdir / "starts.jsonl").write_text(json.dumps({"revision": "abc", "diff": "", "jax": "1.2.3"}) + "\n")
    return workdir


def check_run(mutation: tuple, place: Path, run: Path) -> None:
    """The commands that take a run directory, and the writer of metrics, which goes on from those that are there."""
    assume(mutation[:2] != ("loop", "metrics.jsonl"))  # nothing that a disk does: it seems not to be there
    workdir = place / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(run, workdir)
    mutate(workdir, *mutation)
    before = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    for command in ("evaluate", "generate"):
        line = ""
        with stopped() as taken:
            line = refusal(command, f"--workdir={workdir}")
        assert bool(line) != bool(taken)
        assert {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before
    with contextlib.suppress(UserError):
        read_runs([workdir])
    _, config = outcome(f"--workdir={workdir}")
    if config:
        make_shapes(config, step=False)
        with contextlib.suppress(UserError):
            MetricsWriter(workdir, config, 3).close()


@fuzz(20)
@given(mutation=mutations(RUN_FILES, ("config.json",)))
def test_a_damaged_run_directory_is_refused_in_one_line_or_taken(mutation, place, run):
    check_run(mutation, place, run)


@pytest.mark.slow
@fuzz(200)
@given(mutation=mutations(RUN_FILES, ("config.json",)))
def test_many_damaged_run_directories(mutation, place, run):
    check_run(mutation, place, run)
