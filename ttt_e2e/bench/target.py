"""`ttt-e2e bench target`: memory, FLOPs and collectives of a run's programs, compiled for accelerators not present."""

import gzip
import logging
import time
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.bench import table
from ttt_e2e.cluster.mesh import BATCH, make_mesh, shardings, with_shardings
from ttt_e2e.config import Config, suggestion
from ttt_e2e.errors import UserError
from ttt_e2e.inference.reader import Reader
from ttt_e2e.kernels.attention import choice
from ttt_e2e.model import abstract_model
from ttt_e2e.outputs import writing
from ttt_e2e.runs.files import replace_bytes
from ttt_e2e.targets import of_device, slices
from ttt_e2e.targets.bound import SHARE, Bound, bound
from ttt_e2e.targets.products import kernels, matmul_flops, uncounted
from ttt_e2e.targets.program import Collective, Program, exchanged
from ttt_e2e.train import policies
from ttt_e2e.train.batches import check_batch
from ttt_e2e.train.flops import model_flops_per_token
from ttt_e2e.train.optimizers import make_optimizer
from ttt_e2e.train.steps import init_state, make_eval_step, make_train_step, take_policies

SHOWN_COLLECTIVES = 12
GIB = 2**30

logger = logging.getLogger(__name__)


class Task(NamedTuple):
    """A program to compile: a jitted function, the shapes of its arguments, and the tokens that one run processes."""

    function: jax.stages.Wrapped
    arguments: tuple
    num_tokens: int


def run(output, config: Config | None = None, *, target: str = "", programs=("train",)) -> list[dict]:
    """Compiles the programs of a run for a target, which need not be present, and reads memory, FLOPs and traffic off.

    Args:
      output: directory for the results.
      config: of the run; its mesh must take all devices of the target.
      target: h100:N, or a100, h200, b200, or v5e:AxB, v6e:AxB, v5p:AxBxC. The compilers come with the extras
        targets-cuda and targets-tpu.
      programs: "train" (the training step), "read" (the evaluation step), "decode" (one generated token, after
        `train.seq_len` others, on one device).

    Returns:
      A row for each program, with figures of one device: `fits`, or the compiler's message where it `refused`;
      `needed_bytes` of memory, and their parts `state_bytes` (parameters, optimizer, batch), `temp_bytes`,
      `code_bytes`; `flops` of matrix products, loops multiplied out; `useless_share`, the share that several devices
      compute alike; `received_bytes` by all collectives, over each axis of the mesh, and by each kind over each axis;
      `kernels` that XLA did not generate, with how often each runs, and `uncounted_kernels`, those whose FLOPs the
      program does not state; `model_flops` that the method itself needs, which the bound uses where kernels are
      uncounted; `bound_seconds`, a lower bound of the run time, the seconds of products, memory and links of which it
      is the greatest, and the one that `binds`; `tokens_per_second` and `device_hours` of the recipe, at the bound and
      at a share of its speed.
    """
    if not target:
        raise UserError("--target is missing: h100:8, v5p:2x2x2, ...")
    for name in programs:
        if name not in PROGRAMS:
            raise UserError(f"--programs={name}: {suggestion(name, list(PROGRAMS))}")
    slice_ = slices.parse(target)
    if config is None:
        raise UserError("--config is missing: bench target compiles the programs of a config file, FILE.py[:ARG]")
    devices = slices.devices(slice_)
    mesh = make_mesh(config.mesh, devices)
    if mesh.size != len(devices):
        shape = f"data={mesh.shape['data']} x model={mesh.shape['model']}"
        raise UserError(f"config.mesh is {shape}, which leaves some of the {len(devices)} devices of {target} out")
    with jax.set_mesh(mesh):
        choice.check(config.model)
    directory = epath.Path(output)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        (directory / _program_file(name)).unlink(missing_ok=True)  # of an earlier call
    rows, notes = [], []
    for name in programs:
        row, note = _examine(name, target, config, mesh, directory)
        rows.append(row)
        notes.append(note)
    about = f"Of one device; bounds at {SHARE:.0%} are what a program that reaches so much of its bound would give."
    text = table.write(output, rows, f"Compiled for {target}", "\n\n".join([about, *notes]), shown=_shown(rows))
    print(text)
    return rows


def _program_file(name: str) -> str:
    return "program.txt.gz" if name == "train" else f"program_{name}.txt.gz"


def _examine(name: str, target: str, config: Config, mesh: Mesh, directory: epath.Path) -> tuple[dict, str]:
    """Compiles a program: (its row of figures, a note in Markdown on its kernels and its largest collectives)."""
    mesh = _alone(mesh) if name == "decode" else mesh
    policies_of_step = take_policies(config, mesh) if name == "train" else None
    resolved = policies_of_step.config if policies_of_step else config
    row = _case(name, target, config, mesh) | (policies_of_step.record() if policies_of_step else {})
    logger.info("%s: tracing", name)
    start = time.perf_counter()
    task, lowered = _lower(PROGRAMS[name], resolved, mesh)
    row["trace_seconds"] = time.perf_counter() - start
    logger.info("%s: compiling for %s", name, target)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = " ".join(str(error).split())[:400]
        return row | {"fits": False, "refused": refused}, f"{name}: refused by the compiler: {refused}"
    row["compile_seconds"] = time.perf_counter() - start
    logger.info("%s: reading the program", name)
    text = compiled.as_text()
    replace_bytes(directory / _program_file(name), gzip.compress(text.encode(), mtime=0))
    program = Program(text)
    moved, used, flops = exchanged(program, mesh.shape), kernels(program), matmul_flops(program)
    facts = of_device(mesh.devices.flat[0])
    row |= _memory(compiled, facts.platform, facts.memory_bytes)
    row |= {"flops": flops, "useless_share": _useless_share(flops, PROGRAMS[name], resolved, mesh)}
    row |= _received(moved, mesh)
    row |= {"kernels": used, "uncounted_kernels": uncounted(program), "unknown_trips": program.unknown_trips}
    if name == "train":
        row["model_flops"] = model_flops_per_token(config) * task.num_tokens / mesh.size
        flops = max(flops, row["model_flops"]) if row["uncounted_kernels"] else flops
    least = bound(facts, flops, _touched(compiled), moved, mesh.shape)
    row |= _times(least, task.num_tokens, mesh.size, config if name == "train" else None)
    return row, _note(name, moved, used)


def _case(name: str, target: str, config: Config, mesh: Mesh) -> dict:
    """The part of a row that identifies it: program, target, mesh, batch, device."""
    facts = of_device(mesh.devices.flat[0])
    batch = {"train": config.train.global_batch_size, "read": config.eval.batch_size, "decode": 1}[name]
    return {
        "variant": name,
        "target": target,
        "mesh": f"{mesh.shape['data']}x{mesh.shape['model']}",
        "batch": batch,
        "accumulation_steps": config.train.accumulation_steps if name == "train" else 1,
        "seq_len": config.train.seq_len,
        "device": facts.kind,
        "device_memory_bytes": facts.memory_bytes,
    }


def _lower(make, config: Config, mesh: Mesh) -> tuple[Task, jax.stages.Lowered]:
    """Makes a program and traces it under the mesh, so that code which asks for the target gets the mesh's devices."""
    with jax.set_mesh(mesh):
        task = make(config, mesh)
        return task, task.function.lower(*task.arguments)


def _train(config: Config, mesh: Mesh) -> Task:
    """The training step, made as the trainer makes it."""
    train = config.train
    check_batch("config.train.global_batch_size", train.global_batch_size, mesh, train.accumulation_steps)
    optimizer = make_optimizer(config.optimizer, abstract_model(config.model)[1], config.model, mesh)
    state = jax.eval_shape(lambda: init_state(config, optimizer))
    placed = shardings(state, mesh, config.model)
    tokens = jax.ShapeDtypeStruct((train.global_batch_size, train.seq_len + 1), jnp.int32)
    arguments = (with_shardings(state, placed), with_shardings(tokens, NamedSharding(mesh, BATCH)))
    num_tokens = train.global_batch_size * train.seq_len
    return Task(make_train_step(config, optimizer, mesh, placed), arguments, num_tokens)


def _read(config: Config, mesh: Mesh) -> Task:
    """The evaluation step, on `eval.batch_size` sequences."""
    batch = config.eval.batch_size
    check_batch("config.eval.batch_size", batch, mesh)
    params = abstract_model(config.model)[1]
    placed = shardings(params, mesh, config.model)
    tokens = jax.ShapeDtypeStruct((batch, config.train.seq_len + 1), jnp.int32)
    rate, count = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.int32))
    arguments = (
        with_shardings(params, placed),
        with_shardings(tokens, NamedSharding(mesh, BATCH)),
        *with_shardings((rate, count), NamedSharding(mesh, P())),
    )
    return Task(make_eval_step(config, mesh, placed), arguments, batch * config.train.seq_len)


def _decode(config: Config, mesh: Mesh) -> Task:
    """The prediction of one token after a context of `train.seq_len` tokens, on one device."""
    graphdef, params = abstract_model(config.model)
    T = config.train.seq_len

    def make_reader(params):
        return Reader(graphdef, params, config, max_length=T + config.inner.mini_batch_size)

    reader = make_reader(params)

    def start(params):
        reader = make_reader(params)
        return reader.with_room(reader.start(config.data.bos_id)._replace(position=np.int64(T)))

    state = jax.eval_shape(start, params)._replace(position=np.int64(T))
    function, arguments = reader.programs(state)["predict"]
    return Task(function, with_shardings(arguments, NamedSharding(mesh, P())), 1)


PROGRAMS = {"train": _train, "read": _read, "decode": _decode}


def _alone(mesh: Mesh) -> Mesh:
    """The mesh of the first device of a mesh."""
    return Mesh(mesh.devices[:1, :1], mesh.axis_names, axis_types=mesh.axis_types)


def _useless_share(flops: int, make, config: Config, mesh: Mesh) -> float:
    """The share of the FLOPs of all devices together that several devices compute alike.

    It is the FLOPs of all devices beyond those of the same program for a single device. The latter is counted before it
    is compiled: the TPU compiler would refuse a program that needs more memory than a device has, and the GPU compiler
    would recompute to save memory. The two counts are comparable, as a test shows: JAX leaves no unused products, and
    XLA neither drops nor adds any, except that it turns products of vectors into sums and drops what is recomputed in
    loops of one trip. Both programs have the same policies, and so recompute the same.
    """
    if mesh.size == 1:
        return 0.0
    _, lowered = _lower(make, config, _alone(mesh))
    undivided = matmul_flops(lowered.as_text("hlo", debug_info=True))
    return 1 - undivided / (mesh.size * flops) if flops else 0.0


def _memory(compiled, platform: str, device_bytes: int) -> dict:
    """Bytes of each device's memory that a program needs, and whether it `fits`."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = {
        "state_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    needed = sum(parts.values()) + results
    usable = device_bytes * policies.USABLE.get(platform, 1)
    return {"fits": not usable or needed <= usable, "needed_bytes": needed, **parts}


def _touched(compiled) -> int:
    """Bytes of memory that a run reads or writes at least once: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def _received(moved: list[Collective], mesh: Mesh) -> dict:
    """Bytes that a device receives: in all, by mesh axis, and by kind of collective and axis."""
    axes, kinds = Counter(dict.fromkeys(mesh.axis_names, 0)), Counter()
    for collective in moved:
        axes[collective.axis] += collective.received_bytes
        kinds[f"{collective.kind} over {collective.axis}"] += collective.received_bytes
    return {
        "received_bytes": sum(axes.values()),
        "received_bytes_by_axis": dict(axes),
        "received_bytes_by_kind": dict(kinds.most_common()),
    }


def _times(least: Bound, num_tokens: int, num_devices: int, recipe: Config | None) -> dict:
    """The bound's seconds and tokens a second, and for a training step the device-hours of its recipe."""
    times = {f"{name}_seconds": getattr(least, name) for name in least._fields}
    times |= {"bound_seconds": least.seconds, "binds": least.binds}
    if not least.seconds:
        return times
    for name, seconds in (("bound", least.seconds), (f"{SHARE:.0%}_of_bound", least.seconds / SHARE)):
        times[f"tokens_per_second_at_{name}"] = num_tokens / seconds
        if recipe:
            times[f"device_hours_at_{name}"] = recipe.train.num_steps * seconds * num_devices / 3600
    return times


def _note(name: str, moved: list[Collective], used: dict) -> str:
    """Markdown: the kernels by name, and a table of the collectives that move most."""
    lines = [
        f"Kernels of {name}: " + (", ".join(f"{kernel} ({n} times)" for kernel, n in used.items()) or "none") + "."
    ]
    if moved:
        lines += ["", "| received, GiB | times | each, MiB | kind | axis | of |", "|---|---|---|---|---|---|"]
    for c in moved[:SHOWN_COLLECTIVES]:
        each = c.received_bytes / c.times / 2**20
        lines.append(
            f"| {c.received_bytes / GIB:.2f} | {c.times} | {each:.2f} | {c.kind} | {c.axis} | `{c.op_name[-80:]}` |"
        )
    return "\n".join(lines)


def _shown(rows: list[dict]) -> list[dict]:
    """The rows transposed for reading: a line for each figure, in readable units, and a column for each program."""
    flat = [_flat(row) for row in rows]
    names = dict.fromkeys(name for row in flat for name in row if name != "variant")
    return [{"": name} | {row["variant"]: row.get(name) for row in flat} for name in names]


def _flat(row: dict) -> dict:
    """A row with bytes in GiB and FLOPs in TFLOP, and nested dicts as one figure for each entry."""
    figures = {}
    for name, value in row.items():
        if name.endswith("_bytes"):
            figures[name.removesuffix("_bytes").replace("_", " ") + ", GiB"] = value / GIB
        elif name.endswith("flops"):
            figures[name.removesuffix("flops").replace("_", " ") + "TFLOP"] = value / 1e12
        elif "_bytes_by_" in name:
            figures |= {
                f"received, {key}, GiB" if "kind" in name else f"received over {key}, GiB": v / GIB
                for key, v in value.items()
            }
        elif name not in ("kernels", "uncounted_kernels"):
            figures[name.replace("_", " ")] = value
    return figures
