"""Resolves "auto" in a config: by the memory that devices have, and by the bytes that they would exchange."""

import dataclasses
import logging
import math
import os

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ttt_e2e import targets
from ttt_e2e.cluster.mesh import BATCH, partition_specs
from ttt_e2e.config import Config
from ttt_e2e.errors import UserError
from ttt_e2e.inner import memory
from ttt_e2e.inner.division import Division
from ttt_e2e.model import abstract_model, abstract_transformer
from ttt_e2e.model.parameters import parameter_name
from ttt_e2e.model.stacks import num_blocks

logger = logging.getLogger(__name__)

STATE_COPIES = 4  # arrays of the parameters' size in a step: parameters, gradient, and AdamW's two moments
# Share of a device's memory that JAX uses by default, for devices that are only compiled for.
USABLE = {"gpu": 0.75, "tpu": 0.97}
# Bytes that compiled programs took for each byte that is estimated. TPUs pad heads of 80 channels to 128, and copy.
TAKEN = {"tpu": 1.7}


def for_training(config: Config, graphdef, params, mesh: Mesh, division: Division) -> Config:
    """Replaces "auto" in `inner.trajectory` and `inner.remat` by what fits into memory; logs the choice and the
    estimate.

    graphdef, params: the model's static structure, and the shapes of {"fast", "slow"}.
    """
    inner = config.inner
    if "auto" not in (inner.trajectory, inner.remat):
        return config
    batch = config.train.global_batch_size // config.train.accumulation_steps
    tokens = jax.ShapeDtypeStruct((max(mesh.shape["data"], batch), config.train.seq_len + 1), jnp.int32)
    budget = inner.memory_budget_bytes or free_bytes(params, mesh)
    taken = TAKEN.get(mesh.devices.flat[0].platform, 1.0)
    choices = []

    def on_a_device(params, tokens):
        choices.append(memory.choose(inner, graphdef, params["fast"], params["slow"], tokens, budget / taken, division))
        return tokens

    specs = (partition_specs(params, mesh, config.model), BATCH)
    jax.eval_shape(
        jax.shard_map(on_a_device, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False), params, tokens
    )
    chosen, needed = choices[-1]
    logger.info(
        "inner.trajectory %s, inner.remat %s: estimated %.2f GiB of a budget of %.2f GiB%s",
        chosen.trajectory,
        chosen.remat,
        needed * taken / 2**30,
        budget / 2**30,
        "" if needed * taken <= budget else "; nothing smaller is known",
    )
    return dataclasses.replace(config, inner=chosen)


def for_reading(config: Config) -> Config:
    """Replaces "auto" for reading without a gradient. Nothing is saved then; only the rounding of "delta" matters."""
    trajectory = config.inner.trajectory.replace("auto", "store")
    inner = dataclasses.replace(config.inner, trajectory=trajectory, remat="mini_batch")
    return dataclasses.replace(config, inner=inner)


def prefix_by_sequence(config: Config, mesh: Mesh) -> bool:
    """Decides whether the prefix divides positions over the `model` axis, not matrices; logs the choice and the bytes.

    "auto" chooses the one for which a device receives fewer bytes in a step. If the key/value heads do not divide
    evenly, it chooses positions in any case: by matrices, every device would compute attention of all heads.

    Raises:
      UserError: `mesh.prefix` is "sequence", and a mixer does not support it.
    """
    model, num_parts = config.model, mesh.shape["model"]
    if num_parts == 1 or not model.num_prefix_blocks or config.train.seq_len % num_parts:
        return False
    if config.mesh.prefix == "matrices":
        return False
    transformer = abstract_transformer(model)
    obstacle = transformer.obstacle("sequence axis", transformer.prefix_stacks)
    if config.mesh.prefix == "sequence" and obstacle:
        raise UserError(f"{obstacle}: config.mesh.prefix must be 'matrices' or 'auto'")
    if config.mesh.prefix == "sequence" or obstacle:
        return config.mesh.prefix == "sequence"
    parts = config.train.accumulation_steps * mesh.shape["data"]
    sequences = max(1, config.train.global_batch_size // parts)
    received = {name: prefix_bytes(config, sequences, num_parts, name) for name in ("sequence", "matrices")}
    num_heads = {stack.mixer.num_heads for stack in transformer.prefix_stacks.values()}
    heads_divide = all(count % num_parts == 0 for count in num_heads)
    chosen_division = min(received, key=received.get) if heads_divide else "sequence"
    logger.info(
        "mesh.prefix %s: a device receives %.2f GiB in a step by the sequence, %.2f GiB by the matrices%s",
        chosen_division,
        *(received[name] / 2**30 for name in ("sequence", "matrices")),
        "" if heads_divide else f", which does not divide {', '.join(map(str, sorted(num_heads)))} heads",
    )
    return chosen_division == "sequence"


def prefix_bytes(config: Config, sequences: int, num_parts: int, divided: str) -> float:
    """Counts the bytes that a device receives over the `model` axis for the prefix, in one step of `sequences`
    sequences.

    divided: "matrices": two sums of hidden states in each of a block's three passes (forward, rematerialisation,
        reverse). "sequence": a block's weights, forwards and again in reverse; the sum of their gradients; and in each
        of the three passes the keys and values that attention fetches (`Mixer.received`).
    """
    model, T = config.model, config.train.seq_len
    size, share = jnp.dtype(model.compute_dtype).itemsize, (num_parts - 1) / num_parts
    if divided == "matrices":
        return model.num_prefix_blocks * 6 * 2 * share * sequences * T * model.hidden_size * size
    stacks = abstract_transformer(model).prefix_stacks.values()
    parameters = [leaf for stack in stacks for leaf in jax.tree.leaves(nnx.state(stack))]
    num_weights = sum(leaf.size for leaf in parameters if leaf.ndim > 2)  # of all blocks: matrices, stacked
    fetched = share * num_weights * (2 * size + jnp.dtype(model.param_dtype).itemsize)
    numbers = sum(num_blocks(stack) * stack.mixer.received(T // num_parts, num_parts) for stack in stacks)
    return fetched + 3 * sequences * numbers * size


def check_tables(config: Config, mesh: Mesh) -> None:
    """Raises `UserError` if a device cannot hold its part of Engram's tables, and what a training step has for each."""
    _, params = abstract_model(config.model)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    specs = jax.tree.leaves(partition_specs(params, mesh, config.model))
    tables = [
        math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for (path, leaf), spec in zip(leaves, specs, strict=True)
        if parameter_name(path).endswith(".engram.table")
    ]
    needed, memory_bytes = sum(tables) * (1 if config.optimizer.train_only else STATE_COPIES), device_bytes(mesh)
    if needed > memory_bytes:
        size = config.model.engram.table_size
        raise UserError(
            f"config.model.engram.table_size is {size}, whose tables take {needed / 2**30:.1f} GiB of a device in "
            f"training, which has {memory_bytes / 2**30:.1f} GiB: it must be at most about "
            f"{size * memory_bytes // needed} on this mesh, or head_dim or num_heads less"
        )


def free_bytes(params, mesh: Mesh) -> int:
    """Computes the bytes that a device of the mesh has for temporaries: its memory less its part of the training state.

    `params` are shapes; the state is assumed to be divided over all devices.
    """
    state = STATE_COPIES * sum(math.prod(p.shape) * jnp.dtype(p.dtype).itemsize for p in jax.tree.leaves(params))
    return max(0, device_bytes(mesh) - state // mesh.size)


def device_bytes(mesh: Mesh) -> int:
    """Computes the bytes of memory that a device of the mesh has.

    It is what the device reports; on CPU, half of the machine's, divided among the CPU devices; for a device that is
    only compiled for, that of its kind (targets/).
    """
    device = mesh.devices.flat[0]
    here = device in jax.local_devices()
    reported = ((device.memory_stats() if here else None) or {}).get("bytes_limit")
    if reported is None:
        target = targets.of_device(device)
        reported = int(target.memory_bytes * USABLE.get(target.platform, 1))
    if not reported:
        reported = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // jax.local_device_count()
    return reported
