"""The command line: `ttt-e2e COMMAND --flag=value ...`."""

import inspect
import json
import logging
import sys

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from ttt_e2e.config import Config, suggestion, to_dict
from ttt_e2e.errors import EXIT_REQUEUE, PreemptedError, UserError
from ttt_e2e.flags import load_config_file, override, parse


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0, or with one line on stderr: 2 after bad input, 75 where the command was preempted and is to be started again, 1
    where another process of the run is gone, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("ttt_e2e").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax narrates every save
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(_help())
        elif argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]!r}: {suggestion(argv[0], list(COMMANDS))}")
        else:
            COMMANDS[argv[0]](argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _leave(2)
    except PreemptedError as error:
        print(error, file=sys.stderr)
        return _leave(EXIT_REQUEUE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
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
        _string(values, "input", "stdlib, or a file, directory or glob of .txt .md .py .jsonl, plain or .gz.")
        _string(values, "tokenizer", "bytes, a SentencePiece MODEL.model, or train:VOCAB to train one on the input.")
        _string(values, "output", "Directory of the token store to write.")
        flags.DEFINE_integer("min_tokens", 0, "Leave out shorter documents.", lower_bound=0, flag_values=values)
        flags.DEFINE_integer("num_workers", -1, "Tokenising processes; -1 = one per core.", flag_values=values)

    values, _ = parse(argv, define, "ttt-e2e prepare: tokenise text into a token store.")
    _require(values, "input", "tokenizer", "output")
    from ttt_e2e.data.prepare import prepare

    workers = {} if values.num_workers < 0 else {"num_workers": values.num_workers}
    summary = prepare(values.input, values.tokenizer, values.output, min_tokens=values.min_tokens, **workers)
    print(json.dumps(summary, indent=2, default=str))


def train(argv: list[str]) -> None:
    """Train, or resume, the run of a working directory."""

    def define(values):
        _config(values)
        _string(values, "workdir", "Run directory; a run that it holds is resumed.")
        _processes(values)

    values, overrides = parse(argv, define, "ttt-e2e train: train a model, or resume its run.")
    _require(values, "workdir")
    config = _resolve(values, overrides)
    is_main = _join(values)
    from ttt_e2e.outer.loop import train

    metrics = train(config, values.workdir, overrides)
    loss = f"loss {metrics['loss']:.4f}" if metrics else "nothing left to do"
    if is_main:
        print(f"{values.workdir}: {config.train.num_steps} steps done, {loss}")


def evaluate(argv: list[str]) -> None:
    """Measure a checkpoint on held-out text: its loss, with and without learning, context lengths, needles, samples."""

    def define(values):
        _trained_model(values)
        _string(values, "output", "Directory for what is found; default: WORKDIR/evaluation.")
        _long_context(values)
        _processes(values)

    values, overrides = parse(argv, define, "ttt-e2e evaluate: held-out loss of a checkpoint, or what it recalls.")
    config = _resolve(values, overrides)
    if not values.workdir:
        _require(values, "checkpoint", "output")
    checkpoint, output = values.checkpoint or values.workdir, values.output or f"{values.workdir}/evaluation"
    asked = _asked_evaluations(values)
    is_main = _join(values)
    if not asked:
        from ttt_e2e.evaluation.token_losses import evaluate

        metrics = evaluate(config, checkpoint, output)
        if is_main:
            print(json.dumps({"output": output, **metrics}, indent=2))
        return
    import jax

    if jax.process_count() > 1:
        raise UserError(f"--{asked[0][0].NAME} runs in one process, and this is one of several: start it alone")
    from ttt_e2e.outer.checkpoint import find_step

    find_step(checkpoint)
    for evaluation, settings in asked:  # all of them before the first one runs, which may take hours
        evaluation.check(config, settings)
    results = {"output": output}
    for evaluation, settings in asked:
        result = evaluation.evaluate(config, checkpoint, output, settings)
        results[evaluation.NAME] = {k: v for k, v in result.items() if k not in ("cells", "about")}
    print(json.dumps(results, indent=2))


def generate(argv: list[str]) -> None:
    """Continue a prompt, or save what reading it taught."""

    def define(values):
        _trained_model(values)
        _string(values, "prompt", "Text to continue; without any, a new document.")
        _string(values, "prompt_file", "File with the prompt, or .jsonl with one a line, in the field `prompt`.")
        flags.DEFINE_integer("max_new_tokens", 128, "Tokens to generate; 0 = only read.", flag_values=values)
        _sampling(values)
        flags.DEFINE_float("repetition_penalty", 1.0, "Weakens tokens that were there; 1 = off.", flag_values=values)
        flags.DEFINE_multi_string("stop", [], "Text to stop before; may be given repeatedly.", flag_values=values)
        _string(values, "learn", "Learn while reading from: all, prompt or none.", "all")
        _string(values, "load_state", "Saved state to go on from.")
        _string(values, "save_state", "Directory to save the state in afterwards.")
        _string(values, "precision", "Of the saved fast weights: float32 or bfloat16.", "float32")
        flags.DEFINE_integer("max_length", 0, "Tokens full attention has room for; 0 = as needed.", flag_values=values)
        _string(values, "output", "File for results as JSON lines; default: stdout.")

    values, overrides = parse(argv, define, "ttt-e2e generate: continue prompts, learning while reading them.")
    config = _resolve(values, overrides)
    if not values.workdir:
        _require(values, "checkpoint")
    if values.prompt and values.prompt_file:
        raise UserError("--prompt and --prompt_file are both given: choose one")
    from ttt_e2e.inference.generate import Settings, generate
    from ttt_e2e.inference.prompts import read_prompts
    from ttt_e2e.inference.sampling import Sampling

    prompts = read_prompts(values.prompt_file) if values.prompt_file else [values.prompt]
    sampling = Sampling(values.temperature, values.top_k, values.top_p, values.repetition_penalty)
    settings = Settings(values.max_new_tokens, sampling, values.seed, tuple(values.stop), values.learn)
    states = {"load_from": values.load_state, "save_to": values.save_state, "precision": values.precision}
    checkpoint = values.checkpoint or values.workdir
    generate(config, checkpoint, prompts, settings, **states, output=values.output, max_length=values.max_length)


def import_(argv: list[str]) -> None:
    """Convert a checkpoint of another program into ours."""

    def define(values):
        flags.DEFINE_enum("source", None, ["official"], "Program that wrote it.", flag_values=values)
        _config(values)
        _string(values, "checkpoint", "The checkpoint to read.")
        _string(values, "output", "Checkpoint directory to write, for --checkpoint or config.train.init_from.")

    values, overrides = parse(argv, define, "ttt-e2e import: convert a checkpoint of another program.")
    _require(values, "source", "checkpoint", "output")
    config = _resolve(values, overrides)
    from ttt_e2e.interop.official import import_checkpoint

    print(f"imported as {import_checkpoint(config, values.checkpoint, values.output)}")


def report(argv: list[str]) -> None:
    """Plot and tabulate runs."""

    def define(values):
        flags.DEFINE_list(
            "workdirs", None, "Run directories, A,B,...; a sweep directory stands for its runs.", flag_values=values
        )
        _string(values, "output", "Directory for the plots and report.html.")

    values, _ = parse(argv, define, "ttt-e2e report: plots and a page of one or several runs.")
    _require(values, "workdirs", "output")
    from ttt_e2e.evaluation.report import format_table, write_report

    summary = write_report(values.workdirs, values.output)
    print(format_table(summary["rows"]))
    print(f"report: {values.output}/report.html")


def bench(argv: list[str]) -> None:
    """Measure time, FLOPs and memory: bench window_attention, attention_check, meta_gradient or latency."""
    from ttt_e2e.bench import attention_check, latency, meta_gradient, window_attention

    benchmarks = {
        "window_attention": window_attention.run,
        "attention_check": attention_check.run,
        "meta_gradient": meta_gradient.run,
        "latency": latency.run,
    }
    name = argv[0] if argv else ""
    if name not in benchmarks and name not in ("-h", "--help"):
        raise UserError(
            f"bench takes the name of a benchmark first, not {name!r}: {suggestion(name, list(benchmarks))}"
        )
    run = benchmarks.get(name, meta_gradient.run)
    parameters = inspect.signature(run).parameters
    options = [p for p in parameters.values() if p.kind is p.KEYWORD_ONLY]

    def define(values):
        _string(values, "output", "Directory for results.json and results.md.")
        if "config" in parameters:
            _config(values)
        for option in options:
            _bench_flag(values, option.name, option.default)

    values, overrides = parse(argv[1:], define, f"ttt-e2e bench {name}: {inspect.getdoc(run)}")
    _require(values, "output")
    config = {"config": _resolve(values, overrides)} if overrides or ("config" in values and values.config) else {}
    run(values.output, **config, **{option.name: _bench_value(values, option) for option in options})


COMMANDS = {
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "import": import_,
    "report": report,
    "bench": bench,
}


def _help() -> str:
    lines = [f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: ttt-e2e COMMAND --flag=value ...  (ttt-e2e COMMAND --help lists its flags)", *lines])


def _string(values: flags.FlagValues, name: str, text: str, default: str = "") -> None:
    flags.DEFINE_string(name, default, text, flag_values=values)


def _config(values: flags.FlagValues) -> None:
    _string(values, "config", "Config file, FILE.py[:ARG]; override fields by --config.section.field=value.")


def _trained_model(values: flags.FlagValues) -> None:
    _config(values)
    _string(values, "workdir", "Run directory to take the newest checkpoint of.")
    _string(values, "checkpoint", "Checkpoint directory; default: the workdir's newest.")


def _processes(values: flags.FlagValues) -> None:
    _string(values, "coordinator", "HOST:PORT of process 0, where several processes make one run; default: by cluster.")
    flags.DEFINE_integer("num_processes", 0, "Processes of the run; 0 = as the cluster says.", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "Which of them this is, from 0; -1 = by cluster.", flag_values=values)
    bound = {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_integer("initialization_timeout", 300, "Seconds to wait for all processes.", **bound)
    flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds until a silent process counts as dead.", **bound)


def _join(values: flags.FlagValues) -> bool:
    """Joins the other processes of the run, if there are any; returns whether this is the one that speaks for all."""
    from ttt_e2e.outer import distributed

    names = ("coordinator", "num_processes", "process_id", "initialization_timeout", "heartbeat_timeout")
    return distributed.initialize(**{name: values[name].value for name in names})


def _leave(code: int) -> int:
    """Leaves the run's other processes, where there are any, and returns the exit code."""
    distributed = sys.modules.get("ttt_e2e.outer.distributed")  # a command that never joined imports nothing for it
    if distributed:
        distributed.leave(code)
    return code


def _is_of_a_peer(error: Exception) -> bool:
    distributed = sys.modules.get("ttt_e2e.outer.distributed")
    return bool(distributed) and distributed.is_of_a_peer(error)


def _sampling(values: flags.FlagValues) -> None:
    flags.DEFINE_float("temperature", 1.0, "0 = always the likeliest token.", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens; 0 = off.", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "Draw from the fewest with this probability; 1 = off.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of what is drawn.", flag_values=values)


# The flags that each evaluation of long contexts takes, after the one that asks for it.
LONG_CONTEXT = {
    "context_lengths": ("scored_tokens", "num_stretches"),
    "needle": ("needle_lengths", "needle_depths", "needle_samples"),
    "generation": (
        *("generation_prompt_tokens", "generation_tokens", "generation_samples"),
        *("temperature", "top_k", "top_p", "seed", "judge"),
    ),
}


def _long_context(values: flags.FlagValues) -> None:
    lengths = "Instead: loss of the same held-out tokens after contexts of these lengths, as 1024,2048,4096."
    flags.DEFINE_list("context_lengths", [], lengths, flag_values=values)
    scored = "Last tokens of a context that the loss is taken of; 0 = as many as the shortest length."
    flags.DEFINE_integer("scored_tokens", 0, scored, flag_values=values)
    stretches = "At most as many stretches of held-out text, each of the longest length; 0 = all."
    flags.DEFINE_integer("num_stretches", 32, stretches, flag_values=values)
    tasks = "Instead: retrieval of 1 = a number in noise, 2 = a number in text, 3 = a UUID in text, as 1,2,3."
    flags.DEFINE_list("needle", [], tasks, flag_values=values)
    lengths = "Tokens of the prompts; default: a quarter, half, one and two of the trained length, where they fit."
    flags.DEFINE_list("needle_lengths", [], lengths, flag_values=values)
    depths = "Where in the text the needle is, in percent."
    flags.DEFINE_list("needle_depths", ["0", "25", "50", "75", "100"], depths, flag_values=values)
    flags.DEFINE_integer("needle_samples", 4, "Prompts for each task, length and depth.", flag_values=values)
    continuations = "Instead: continuations of held-out documents, scored by a judge."
    flags.DEFINE_boolean("generation", False, continuations, flag_values=values)
    prompt = "First tokens of a document to continue; 0 = half the trained length."
    flags.DEFINE_integer("generation_prompt_tokens", 0, prompt, flag_values=values)
    flags.DEFINE_integer("generation_tokens", 128, "Tokens to generate, at most.", flag_values=values)
    flags.DEFINE_integer("generation_samples", 16, "Documents to continue, at most.", flag_values=values)
    _sampling(values)
    _string(values, "judge", "Run directory of the judge, or a checkpoint in one; default: the model itself.")


def _asked_evaluations(values: flags.FlagValues) -> list:
    """The evaluations of long contexts that are asked for, each a module with its settings."""
    for evaluation, names in LONG_CONTEXT.items():
        for name in names:
            if values[name].present and not values[evaluation].value:
                raise UserError(f"--{name} belongs to --{evaluation}, which is missing")
    asked = []
    if values.context_lengths:
        from ttt_e2e.evaluation import context_lengths

        lengths = _integers(values, "context_lengths")
        asked.append((context_lengths, context_lengths.Settings(lengths, values.scored_tokens, values.num_stretches)))
    if values.needle:
        from ttt_e2e.evaluation import needle

        lists = (_integers(values, name) for name in ("needle", "needle_lengths", "needle_depths"))
        asked.append((needle, needle.Settings(*lists, values.needle_samples)))
    if values.generation:
        from ttt_e2e.evaluation import generation
        from ttt_e2e.inference.sampling import Sampling

        sizes = (values.generation_prompt_tokens, values.generation_tokens, values.generation_samples)
        sampling = Sampling(values.temperature, values.top_k, values.top_p)
        asked.append((generation, generation.Settings(*sizes, sampling, values.seed, values.judge)))
    return asked


def _integers(values: flags.FlagValues, name: str) -> tuple[int, ...]:
    """What a flag lists. Raises `UserError` where that is anything but integers."""
    try:
        return tuple(map(int, values[name].value))
    except ValueError:
        listed = ",".join(values[name].value)
        raise UserError(f"--{name}={listed}: it takes integers separated by commas") from None


def _bench_flag(values: flags.FlagValues, name: str, default) -> None:
    """A flag for an option of a benchmark: a list of values where its default is one."""
    kinds = {int: flags.DEFINE_integer, str: flags.DEFINE_string, bool: flags.DEFINE_boolean, tuple: flags.DEFINE_list}
    define = kinds[type(default)]
    text = "Several may be given, separated by commas." if isinstance(default, tuple) else "Size of the case."
    define(name, list(map(str, default)) if isinstance(default, tuple) else default, text, flag_values=values)


def _bench_value(values: flags.FlagValues, option: inspect.Parameter):
    value = values[option.name].value
    if not isinstance(option.default, tuple):
        return value
    try:
        return tuple(map(type(option.default[0]), value))
    except ValueError:
        raise UserError(f"--{option.name}={','.join(value)}: it takes integers separated by commas") from None


def _require(values: flags.FlagValues, *names: str) -> None:
    for name in names:
        if not values[name].value:
            raise UserError(f"--{name} is missing: {values[name].help}")


def _resolve(values: flags.FlagValues, overrides: list[str]) -> Config:
    """The config of `--config`, else the one that the run directory recorded; then the overrides."""
    if values.config:
        return override(load_config_file(values.config), overrides)
    workdir = values["workdir"].value if "workdir" in values else ""
    if not workdir:
        raise UserError("--config is missing: give a config file, or the --workdir of a run")
    from ttt_e2e.outer.run_directory import load_config

    return override(ConfigDict(to_dict(load_config(workdir))), overrides)
