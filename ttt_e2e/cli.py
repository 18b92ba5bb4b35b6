"""The command line, `ttt-e2e COMMAND --flag=value ...`. A command's docstring is its line in the help."""

import inspect
import logging
import platform
import sys
from dataclasses import replace
from importlib.metadata import version

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

import ttt_e2e
from ttt_e2e import paths, settings, streams
from ttt_e2e.cluster import signals
from ttt_e2e.config import Config, suggestion, to_dict
from ttt_e2e.errors import EXIT_REQUEUE, DivergedError, PreemptedError, UserError
from ttt_e2e.flags import given_paths, load_config_file, override, parse, path, path_list, repeated_path, string
from ttt_e2e.outputs import check_directory, check_file, is_of_the_disk
from ttt_e2e.runs.secrets import redact
from ttt_e2e.strict_json import to_json

HELP = ("-h", "--help", "help")
_INPUTS = "a file, directory or glob of .txt .md .py .jsonl, plain, .gz or .zst, or of .parquet"


def main(argv: list[str] | None = None) -> int:
    """Runs one command, with streams that outlive their readers; returns the exit code.

    Without `argv` it is the program itself, whose arguments are those of the process, and so are its signals.
    """
    if argv is None:
        argv = sys.argv[1:]
        _receive_signals(argv)
    return streams.run(lambda: _main(argv))


def _main(argv: list[str]) -> int:
    """Runs one command; returns the exit code.

    0: done. Otherwise with one line on stderr, 2: bad input; 75: preempted, to be started again; 1: what a model
    computes is not finite, or another process of the run has ended; 130: Ctrl-C. An exception that is none of these is
    raised.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("ttt_e2e").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax logs many lines for every save
    try:
        if len(argv) > 1 and argv[0] in HELP:  # help train
            argv = [*argv[1:], "--help"]
        if not argv or argv[0] in HELP:
            print(_help())
        elif argv[0] in ("--version", "version"):
            print(f"ttt-e2e {ttt_e2e.__version__}, JAX {version('jax')}, Python {platform.python_version()}")
        elif argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]!r}: {suggestion(argv[0], list(COMMANDS))}")
        else:
            COMMANDS[argv[0]](argv[1:])
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return _leave(2)
    except DivergedError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return _leave(1)
    except PreemptedError as error:
        print(error, file=sys.stderr)
        return _leave(EXIT_REQUEUE)
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        if str(error):  # all processes have agreed to stop
            _leave(EXIT_REQUEUE)
        return 130
    except OSError as error:
        if not is_of_the_disk(error):
            raise
        print(f"error: {error.filename or 'output'} cannot be written: {error.strerror}", file=sys.stderr)
        return _leave(2)
    except Exception as error:
        if not _is_of_a_peer(error):
            raise
        reason = str(error).splitlines()[0][:200]
        print(f"error: another process of the run is gone; its own output says why ({reason})", file=sys.stderr)
        return _leave(1)
    return _leave(0)


def prepare(argv: list[str]) -> None:
    """Tokenise text into a token store."""

    def define(values):
        repeated_path(values, "input", f"stdlib, or {_INPUTS}; several: with commas, or repeated.")
        path(values, "tokenizer", "bytes, a MODEL.model or tokenizer.json, or train:VOCAB to train one on the input.")
        path(values, "output", "Directory of the token store to write.")
        flags.DEFINE_integer("min_tokens", 0, "Leave out shorter documents.", lower_bound=0, flag_values=values)
        flags.DEFINE_float("val_fraction", 0.05, "Share of documents that is held out.", flag_values=values)
        repeated_path(values, "val_input", "Held-out documents, instead of a share of the input.")
        string(values, "text_field", "Field of a record that has its text; a.b is one in another.", "text")
        string(values, "on_bad_record", "fail, or skip to go on without records that have no text.", "fail")
        string(values, "part", "I/N: only the part I, from 0, of N, for --merge.")
        path_list(values, "merge", "Stores of all N parts, A,B,...: makes one of them, without input.")
        flags.DEFINE_integer("num_workers", -1, "Tokenising processes; -1 = one per core.", flag_values=values)

    values, _ = parse(argv, define, "ttt-e2e prepare: tokenise text into a token store.")
    _require(values, "output")
    check_directory("output", values.output)
    from ttt_e2e.data.prepare import merge, prepare

    if values.merge:
        if values.input or values.tokenizer:
            raise UserError("--merge takes the stores of parts, and no --input or --tokenizer")
        summary = merge(values.merge, values.output)
    else:
        _require(values, "input", "tokenizer")
        names = ("min_tokens", "val_fraction", "val_input", "text_field", "on_bad_record", "part")
        options = {name: values[name].value for name in names}
        workers = {} if values.num_workers < 0 else {"num_workers": values.num_workers}
        summary = prepare(values.input, values.tokenizer, values.output, **options, **workers)
    print(to_json(summary, indent=2, default=str))


def train(argv: list[str]) -> None:
    """Train, or resume, the run of a working directory."""

    def define(values):
        _config(values)
        path(values, "workdir", "Run directory; a run that it holds is resumed.")
        _processes(values)

    values, overrides = _parse(argv, define, "ttt-e2e train: train a model, or resume its run.")
    _require(values, "workdir")
    config = _resolve(values, overrides)
    is_main = _join(values)
    check_directory("workdir", values.workdir)
    from ttt_e2e.train.loop import train

    metrics = train(config, values.workdir, overrides)
    loss = f"loss {metrics['loss']:.4f}" if metrics else "nothing left to do"
    if is_main:
        print(f"{values.workdir}: {config.train.num_steps} steps done, {loss}")


def evaluate(argv: list[str]) -> None:
    """Measure a checkpoint on held-out text: its loss, with and without learning, context lengths, needles, samples."""
    from ttt_e2e.evaluation import flags as evaluation
    from ttt_e2e.evaluation.base import run_all

    def define(values):
        _trained_model(values)
        path(values, "output", "Directory for what is found; default: WORKDIR/evaluation.")
        evaluation.define(values)
        _processes(values)

    values, overrides = _parse(argv, define, "ttt-e2e evaluate: held-out loss of a checkpoint, or what it recalls.")
    config = _resolve(values, overrides)
    if not values.workdir:
        _require(values, "checkpoint", "output")
    checkpoint, output = values.checkpoint or values.workdir, values.output or f"{values.workdir}/evaluation"
    asked = evaluation.asked(values)
    is_main = _join(values)
    if is_main:
        check_directory("output", output)
    results, diverged = run_all(asked, config, checkpoint, output)
    if is_main:
        print(to_json(results, indent=2))
    if diverged:
        raise DivergedError(f"{diverged[0]}, from checkpoint {checkpoint}; in {output} such numbers are null")


def generate(argv: list[str]) -> None:
    """Continue a prompt, or save what reading it taught."""
    from ttt_e2e.inference.settings import Sampling

    def define(values):
        _trained_model(values)
        string(values, "prompt", "Text to continue; without any, a new document.")
        path(values, "prompt_file", "File with the prompt, or .jsonl with one a line, in the field `prompt`.")
        flags.DEFINE_integer("max_new_tokens", 128, "Tokens to generate; 0 = only read.", flag_values=values)
        settings.define(values, Sampling)
        flags.DEFINE_integer("seed", 0, "Of what is drawn.", flag_values=values)
        flags.DEFINE_float("repetition_penalty", 1.0, "Weakens tokens that were there; 1 = off.", flag_values=values)
        flags.DEFINE_multi_string("stop", [], "Text to stop before; may be given repeatedly.", flag_values=values)
        string(values, "learn", "Learn while reading from: all, prompt or none.", "all")
        path(values, "load_state", "Saved state to go on from.")
        path(values, "save_state", "Directory to save the state in afterwards.")
        string(values, "precision", "Of the saved fast weights: float32 or bfloat16.", "float32")
        flags.DEFINE_integer("max_length", 0, "Tokens full attention has room for; 0 = as needed.", flag_values=values)
        path(values, "output", "File for results as JSON lines; default: stdout.")

    values, overrides = _parse(argv, define, "ttt-e2e generate: continue prompts, learning while reading them.")
    config = _resolve(values, overrides)
    if not values.workdir:
        _require(values, "checkpoint")
    if values.prompt and values.prompt_file:
        raise UserError("--prompt and --prompt_file are both given: choose one")
    if values.output:
        check_file("output", values.output)
    if values.save_state:
        check_directory("save_state", values.save_state)
    from ttt_e2e.inference.generate import Settings, generate
    from ttt_e2e.inference.prompts import read_prompts

    prompts = read_prompts(values.prompt_file) if values.prompt_file else [values.prompt]
    sampling = replace(settings.read(values, Sampling), repetition_penalty=values.repetition_penalty)
    options = Settings(values.max_new_tokens, sampling, values.seed, tuple(values.stop), values.learn)
    states = {"load_from": values.load_state, "save_to": values.save_state, "precision": values.precision}
    checkpoint = values.checkpoint or values.workdir
    generate(config, checkpoint, prompts, options, **states, output=values.output, max_length=values.max_length)


def import_(argv: list[str]) -> None:
    """Convert a checkpoint of another program into ours."""

    def define(values):
        sources = ["official", "huggingface"]
        flags.DEFINE_enum("source", None, sources, "Program that wrote it.", flag_values=values)
        _config(values)
        path(values, "checkpoint", "The checkpoint to read; of Hugging Face, a directory with config.json.")
        path(
            values,
            "output",
            "Directory to write: of official, checkpoints, for --checkpoint or config.train.init_from; of huggingface, "
            "a run, for --workdir too.",
        )

        whole = {
            "window": "window of attention in all blocks",
            "attention_sinks": "first positions that the windows see, too",
            "num_fast_blocks": "last blocks that get a fast MLP",
            "fast_intermediate_size": "width of the fast MLPs; 0 = that of the other MLPs",
        }
        for name, text in whole.items():
            flags.DEFINE_integer(name, 0, f"Of huggingface: {text}.", lower_bound=0, flag_values=values)

    values, overrides = _parse(argv, define, "ttt-e2e import: convert a checkpoint of another program.")
    _require(values, "source", "checkpoint", "output")
    check_directory("output", values.output)
    if values.source == "huggingface":
        if values.config:
            raise UserError(
                f"--config is {values.config}, but the model's own config.json takes its place: leave it out"
            )
        from ttt_e2e.interop.additions import Additions
        from ttt_e2e.interop.huggingface import import_model

        for name in ("checkpoint", "output"):
            paths.check_local(f"--{name}", values[name].value)
        additions = Additions(*(values[name].value for name in Additions._fields))
        print(f"imported as {import_model(values.checkpoint, values.output, overrides, additions)}")
        return
    config = _resolve(values, overrides)
    from ttt_e2e.interop.official import import_checkpoint

    print(f"imported as {import_checkpoint(config, values.checkpoint, values.output)}")


def export(argv: list[str]) -> None:
    """Write a model in the form of another program."""

    def define(values):
        flags.DEFINE_enum("target", None, ["huggingface"], "Program to write it for.", flag_values=values)
        _trained_model(values)
        path(values, "output", "Directory to write.")

    values, overrides = _parse(argv, define, "ttt-e2e export: write a model in the form of another program.")
    _require(values, "target", "output")
    paths.check_local("--output", values.output)
    check_directory("output", values.output)
    config = _resolve(values, overrides)
    if not values.workdir:
        _require(values, "checkpoint")
    from ttt_e2e.interop.huggingface import export_model

    print(f"exported to {export_model(config, values.checkpoint or values.workdir, values.output)}")


def report(argv: list[str]) -> None:
    """Plot and tabulate runs."""

    def define(values):
        path_list(values, "workdirs", "Run directories, A,B,...; a sweep directory stands for its runs.")
        path(values, "output", "Directory for the plots and report.html.")

    values, _ = _parse(argv, define, "ttt-e2e report: plots and a page of one or several runs.")
    _require(values, "workdirs", "output")
    check_directory("output", values.output)
    from ttt_e2e.evaluation.report import format_table, write_report

    summary = write_report(values.workdirs, values.output)
    print(format_table(summary["rows"]))
    print(f"report: {values.output}/report.html")


def bench(argv: list[str]) -> None:
    """Measure: window_attention, attention_check, kernel_code, meta_gradient, mixers, latency, inner_rate or target."""
    from ttt_e2e.bench import (
        attention_check,
        inner_rate,
        kernel_code,
        latency,
        meta_gradient,
        mixers,
        target,
        window_attention,
    )
    from ttt_e2e.bench import flags as bench_flags

    benchmarks = {
        "window_attention": window_attention.run,
        "attention_check": attention_check.run,
        "kernel_code": kernel_code.run,
        "meta_gradient": meta_gradient.run,
        "mixers": mixers.run,
        "latency": latency.run,
        "inner_rate": inner_rate.run,
        "target": target.run,
    }
    name = argv[0] if argv else ""
    if name in HELP:
        names = "\n".join(f"  {each:17} {inspect.getdoc(run).splitlines()[0]}" for each, run in benchmarks.items())
        print(f"usage: ttt-e2e bench NAME --output=DIR ...  (ttt-e2e bench NAME --help lists its flags)\n{names}")
        return
    if name not in benchmarks:
        raise UserError(
            f"bench takes the name of a benchmark first, not {name!r}: {suggestion(name, list(benchmarks))}"
        )
    run = benchmarks[name]
    parameters = inspect.signature(run).parameters

    def define(values):
        path(values, "output", "Directory for results.json and results.md.")
        if "checkpoint" in parameters:
            _trained_model(values)
        elif "config" in parameters:
            _config(values)
        bench_flags.define(values, run)

    values, overrides = _parse(argv[1:], define, f"ttt-e2e bench {name}: {inspect.getdoc(run)}")
    _require(values, "output")
    check_directory("output", values.output)
    subject = {}
    if "checkpoint" in parameters:
        subject = {"config": _resolve(values, overrides)}
        if not values.workdir:
            _require(values, "checkpoint")
        subject["checkpoint"] = values.checkpoint or values.workdir
    elif overrides or ("config" in values and values.config):
        subject = {"config": _resolve(values, overrides)}
    run(values.output, **subject, **bench_flags.arguments(values, run))


COMMANDS = {
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "import": import_,
    "export": export,
    "report": report,
    "bench": bench,
}


def _help() -> str:
    """The text of `ttt-e2e --help`: usage, and a line for each command."""
    lines = [f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items()]
    lines.append("  --version  Print the version, and those of JAX and Python.")
    return "\n".join(["usage: ttt-e2e COMMAND --flag=value ...  (ttt-e2e COMMAND --help lists its flags)", *lines])


def _parse(argv: list[str], define, usage: str) -> tuple[flags.FlagValues, list[str]]:
    """Parses flags as `ttt_e2e.flags.parse`. Raises `UserError`, too, where a path is in a bucket out of reach."""
    values, overrides = parse(argv, define, usage)
    for name, place in given_paths(values):
        if name != "config":  # which is of this machine: `load_config_file` says so
            paths.check(f"--{name}", place)
    return values, overrides


def _config(values: flags.FlagValues) -> None:
    """Defines --config."""
    text = "Config file, FILE.py[:ARG], or config.json of a run; override fields by --config.section.field=value."
    path(values, "config", text)


def _trained_model(values: flags.FlagValues) -> None:
    """Defines the flags that name a trained model: --config, --workdir and --checkpoint."""
    _config(values)
    path(values, "workdir", "Run directory to take the newest checkpoint of.")
    path(values, "checkpoint", "Checkpoint directory; default: the workdir's newest.")


def _processes(values: flags.FlagValues) -> None:
    """Defines the flags of runs of several processes."""
    string(values, "coordinator", "HOST:PORT of process 0, where several processes make one run; default: by cluster.")
    flags.DEFINE_integer("num_processes", 0, "Processes of the run; 0 = as the cluster says.", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "Which of them this is, from 0; -1 = by cluster.", flag_values=values)
    bound = {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_integer("initialization_timeout", 300, "Seconds to wait for all processes.", **bound)
    flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds until a silent process counts as dead.", **bound)


def _receive_signals(argv: list[str]) -> None:
    """Has signals to stop end the program as they should: see cluster/signals.py."""
    if argv[:1] in (["train"], ["evaluate"]):
        signals.watch_program()
    else:
        signals.send_interrupts_again()


def _join(values: flags.FlagValues) -> bool:
    """Joins the other processes of the run, if there are any; returns whether this is the one that prints results."""
    from ttt_e2e.cluster import start

    names = ("coordinator", "num_processes", "process_id", "initialization_timeout", "heartbeat_timeout")
    return start.initialize(**{name: values[name].value for name in names})


def _leave(code: int) -> int:
    """Leaves the run's other processes, where there are any; returns `code`."""
    start = sys.modules.get("ttt_e2e.cluster.start")  # not imported by commands that run in one process
    if start:
        start.leave(code)
    return code


def _is_of_a_peer(error: Exception) -> bool:
    """Whether an exception says that another process of the run has ended."""
    start = sys.modules.get("ttt_e2e.cluster.start")
    return bool(start) and start.is_of_a_peer(error)


def _require(values: flags.FlagValues, *names: str) -> None:
    """Raises `UserError` where one of these flags is missing or empty."""
    for name in names:
        if not values[name].value:
            text = values[name].help.partition(";\n")[0]  # what follows is absl's, of flags that may be repeated
            raise UserError(f"--{name} is missing: {text}")


def _resolve(values: flags.FlagValues, overrides: list[str]) -> Config:
    """The config of --config, or else that of the run directory --workdir, with the overrides applied."""
    if values.config:
        return _reachable(override(load_config_file(values.config), overrides))
    workdir = values["workdir"].value if "workdir" in values else ""
    if not workdir:
        raise UserError("--config is missing: give a config file, or the --workdir of a run")
    from ttt_e2e.runs.directory import load_config

    return _reachable(override(ConfigDict(to_dict(load_config(workdir))), overrides))


def _reachable(config: Config) -> Config:
    """The config itself. Raises `UserError` where a checkpoint that it names is in a bucket out of reach."""
    for name in ("init_from", "base"):
        paths.check(f"config.train.{name}", getattr(config.train, name))
    return config
