"""`ttt-e2e bench meta_gradient`: FLOPs, memory and time of a loss and its meta-gradient, by several ways to compute it.

Shapes: `B` batch, `T` sequence, `M` mini-batches, `b` mini-batch.
"""

import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.bench import compiled, table
from ttt_e2e.cluster.mesh import BATCH, divide, make_mesh, shardings
from ttt_e2e.config import ATTENTION_BACKENDS, REMATS, TRAJECTORIES, Config, from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.inner import reference, trajectory
from ttt_e2e.inner.division import Division, fetch
from ttt_e2e.inner.loop import make_mini_batches, run_prefix, suffix_weights
from ttt_e2e.inner.step import MiniBatch, mini_batch_loss
from ttt_e2e.model import abstract_model
from ttt_e2e.model.mixers import Context
from ttt_e2e.model.parameters import merge, split, structure_of
from ttt_e2e.progress import progress_bar
from ttt_e2e.train import policies
from ttt_e2e.train.batches import check_batch
from ttt_e2e.train.steps import init_state, make_gradient, take_policies

RATIOS = ("flops", "temp_bytes", "step_seconds")
EXACT = tuple(f"exact/{trajectory}/{remat}" for trajectory in TRAJECTORIES for remat in REMATS)
VARIANTS = ("plain", "reference", "nested_remat", *EXACT, "first_order")
DEFAULT_VARIANTS = tuple(v for v in VARIANTS if "auto" not in v or v == "exact/auto/auto")


def run(  # noqa: PLR0913 -- each is a flag
    output,
    config: Config | None = None,
    *,
    width: int = 256,
    num_heads: int = 4,
    mlp_width: int = 560,
    num_blocks: int = 2,
    num_fast_blocks: int = 2,
    vocab: int = 2048,
    mini_batch: int = 128,
    window: int = 512,
    seq_len: int = 4096,
    batch: int = 0,
    dtype: str = "float32",
    variants=DEFAULT_VARIANTS,
    attention: str = "auto",
    repeats: int = 3,
    abstract: bool = False,
) -> list[dict]:
    """Measures every variant on the same network and tokens; writes the results to `output`, returns the rows.

    The network is that of `config`, if there is one, over its mesh, and with its batch unless `batch` is not 0;
    otherwise the other sizes describe it. `attention` replaces its `model.attention_backend` unless it is "auto".
    `abstract` compiles for as many virtual CPU devices as the mesh has, and runs nothing.

    Returns:
      A row for each variant, with figures per device: `flops` of the compiled program's matrix products, `temp_bytes`
      without arguments and results, `trace_seconds`, `compile_seconds`, `step_seconds`; and if "plain" is among the
      variants, `flops`, `temp_bytes` and `step_seconds` as a ratio to those of "plain".
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"--variants={variant}: legal are {', '.join(VARIANTS)}")
    if attention not in ATTENTION_BACKENDS:
        raise UserError(f"--attention={attention}: legal are {', '.join(ATTENTION_BACKENDS)}")
    if config is None:
        model = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp_width, "compute_dtype": dtype}
        model |= {"num_hidden_layers": num_blocks, "num_attention_heads": num_heads, "sliding_window": window}
        model |= {"num_fast_blocks": num_fast_blocks}
        train = {"seq_len": seq_len, "global_batch_size": batch or 1}
        sections = {"model": model, "inner": {"mini_batch_size": mini_batch}, "train": train, "mesh": {"data": 1}}
        config = from_config_dict(sections)
    if not config.model.num_fast_blocks:
        raise UserError("config.model.num_fast_blocks is 0: bench meta_gradient takes a model with fast weights")
    if abstract:
        _pretend_devices(max(1, config.mesh.data) * config.mesh.model)
    mesh = make_mesh(config.mesh)
    config = _as_measured(config, batch, attention)
    check_batch("--batch", config.train.global_batch_size, mesh)
    case = _case(config, mesh)
    rows = []
    for variant in progress_bar(variants, desc="bench meta_gradient", unit="variant"):
        figures = measure_gradient(_loss_and_gradient(variant, config, mesh), config, mesh, 0 if abstract else repeats)
        rows.append({"variant": variant} | case | figures)
    for plain in [row for row in rows if row["variant"] == "plain"]:
        for row in rows:
            row |= {f"{name}_ratio": row[name] / plain[name] for name in RATIOS if name in row}
    print(table.write(output, rows, "Meta-gradient"))
    return rows


def _as_measured(config: Config, batch: int, attention: str) -> Config:
    """The config with the flags' batch and attention, and no gradient accumulation: "auto" chooses for this step."""
    batch = batch or config.train.global_batch_size
    train = dataclasses.replace(config.train, global_batch_size=batch, accumulation_steps=1)
    attention = config.model.attention_backend if attention == "auto" else attention
    model = dataclasses.replace(config.model, attention_backend=attention)
    return dataclasses.replace(config, train=train, model=model)


def _case(config: Config, mesh: Mesh) -> dict:
    """The case's sizes, which are in every row."""
    return {
        "seq_len": config.train.seq_len,
        "mini_batch": config.inner.mini_batch_size,
        "window": config.model.sliding_window,
        "batch": config.train.global_batch_size,
        "width": config.model.hidden_size,
        "num_blocks": config.model.num_hidden_layers,
        "num_fast_blocks": config.model.num_fast_blocks,
        "vocab": config.model.vocab_size,
        "dtype": config.model.compute_dtype,
        "mesh": f"{mesh.shape['data']}x{mesh.shape['model']}",
        "attention": config.model.attention_backend,
    }


def _pretend_devices(count: int) -> None:
    """Makes JAX show `count` virtual CPU devices; if it has already started, it keeps those it has."""
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def measure_gradient(loss_and_gradient, config: Config, mesh: Mesh, repeats: int) -> dict:
    """Compiles a loss and its gradient for the parameters and the batch of a config, and measures them.

    Args:
      loss_and_gradient: ({"fast", "slow"}, tokens [B, T + 1], inner learning rate) -> (mean loss, its gradient).
      config: says sizes and batch.
      mesh: over which both are divided.
      repeats: how often it is timed; 0 = not at all.

    Returns:
      `flops`, `temp_bytes`, `trace_seconds` and `compile_seconds`; if it is timed, `step_seconds`.
    """
    _, params = abstract_model(config.model)
    tokens = jax.ShapeDtypeStruct((config.train.global_batch_size, config.train.seq_len + 1), jnp.int32)
    placed = (shardings(params, mesh, config.model), NamedSharding(mesh, BATCH))
    gradient = jax.jit(
        lambda params, tokens: loss_and_gradient(params, tokens, jnp.float32(config.inner.learning_rate)),
        in_shardings=placed,
        out_shardings=(NamedSharding(mesh, P()), placed[0]),
    )
    measured = compiled.measure(gradient, params, tokens)
    figures = {name: getattr(measured, name) for name in ("flops", "temp_bytes", "trace_seconds", "compile_seconds")}
    if not repeats:
        return figures
    make = jax.jit(lambda: init_state(config, optax.identity()).params, out_shardings=placed[0])
    numbers = np.random.default_rng(0).integers(0, config.model.vocab_size, tokens.shape).astype(np.int32)
    arguments = (make(), jax.device_put(numbers, placed[1]))
    return figures | {"step_seconds": compiled.seconds_per_call(measured.call, *arguments, repeats=repeats)}


def _loss_and_gradient(variant: str, config: Config, mesh: Mesh):
    """A variant's function: ({"fast", "slow"}, tokens [B, T + 1], inner learning rate) -> (mean loss, its gradient)."""
    if variant in ("plain", "nested_remat"):
        adapt = _without_inner_loop if variant == "plain" else _nested_remat
        graphdef, params = abstract_model(config.model)
        division = divide(config, params, mesh, by_sequence=policies.prefix_by_sequence(config, mesh))
        mean_loss = partial(_loss_of_suffix, graphdef, config, division, partial(adapt, config))
        return make_gradient(config, mesh, division, mean_loss)
    gradient, *pair = variant.split("/")
    rebuilt, remat = pair or ("store", "mini_batch")
    inner = dataclasses.replace(config.inner, gradient=gradient, trajectory=rebuilt, remat=remat)
    chosen = take_policies(dataclasses.replace(config, inner=inner), mesh)
    return make_gradient(chosen.config, mesh, chosen.division)


def _loss_of_suffix(graphdef, config: Config, division: Division, adapt, params, tokens, inner_rate):
    """The mean loss of a batch by this benchmark's `adapt`: (suffix_def, fast, slow, mini_batches) -> losses [M]."""
    model = merge(graphdef, fetch(division.fast, params["fast"]), params["slow"])
    suffix_def, fast, slow = split(model.make_suffix())
    slow = fetch(suffix_weights(division, slow), slow)
    inner = dataclasses.replace(config.inner, remat="mini_batch")
    mini_batches = make_mini_batches(run_prefix(model, tokens, inner, division), tokens, inner, 0, division)
    return jax.vmap(partial(adapt, suffix_def, fast, slow))(mini_batches).mean()


def _without_inner_loop(config: Config, suffix_def, fast, slow, mini_batches: MiniBatch):
    """Losses [M] of the same network with static fast MLPs, read mini-batch by mini-batch, each rematerialised."""
    suffix = structure_of(suffix_def, fast, slow).module
    M, b, _ = mini_batches.hidden.shape

    @partial(jax.checkpoint, prevent_cse=False)
    def read(states, step):
        mini_batch, i = step
        loss, (_, states) = mini_batch_loss(suffix_def, fast, slow, states, Context(start=i * b), mini_batch)
        return states, loss

    return jax.lax.scan(read, suffix.empty(M * b), (mini_batches, jnp.arange(M)))[1]


def _nested_remat(config: Config, suffix_def, fast, slow, mini_batches: MiniBatch):
    """Losses [M] for plain autodiff with nested remat: of groups of mini-batches, and of each mini-batch in them."""
    carry, steps, inner_step = reference.inner_loop(
        suffix_def, config.inner, fast, slow, mini_batches, config.inner.learning_rate
    )
    inner_step = jax.checkpoint(inner_step, prevent_cse=False)

    @partial(jax.checkpoint, prevent_cse=False)
    def read_group(carry, group):
        carry, (loss, _) = jax.lax.scan(inner_step, carry, group)
        return carry, loss

    size = trajectory.segment_length(config.inner, len(mini_batches.targets))
    groups = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), steps)
    return jax.lax.scan(read_group, carry, groups)[1]
