"""What "auto" stands for in a run: policies of the memory that devices have, and of the bytes that they exchange."""

import dataclasses
import logging
import math
import os

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ttt_e2e import targets
from ttt_e2e.cluster.mesh import BATCH, partition_specs
from ttt_e2e.config import Config
from ttt_e2e.errors import UserError
from ttt_e2e.inner import memory
from ttt_e2e.inner.division import Division
from ttt_e2e.model import abstract_transformer

logger = logging.getLogger(__name__)

STATE_COPIES = 4  # of the parameters that live through a step: they, their gradient, and AdamW's two moments
# What JAX takes of a device's memory, where the device is not here to say so: its defaults.
USABLE = {"gpu": 0.75, "tpu": 0.97}


def for_training(config: Config, graphdef, params, mesh: Mesh, division: Division) -> Config:
    """Replaces "auto" in `inner.trajectory` and `inner.remat`; logs what it took and why.

    graphdef, params: the model's structure, and the shapes of {"fast", "slow"}.
    """
    inner = config.inner
    if "auto" not in (inner.trajectory, inner.remat):
        return config
    batch = config.train.global_batch_size // config.train.accumulation_steps
    tokens = jax.ShapeDtypeStruct((max(mesh.shape["data"], batch), config.train.seq_len + 1), jnp.int32)
    budget = inner.memory_budget_bytes or free_bytes(params, mesh)
    choices = []

    def on_a_device(params, tokens):
        choices.append(memory.choose(inner, graphdef, params["fast"], params["slow"], tokens, budget, division))
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
        needed / 2**30,
        budget / 2**30,
        "" if needed <= budget else "; nothing smaller is known",
    )
    return dataclasses.replace(config, inner=chosen)


def for_reading(config: Config) -> Config:
    """Without a gradient nothing is kept, and the policies do not matter but for the rounding of "delta"."""
    trajectory = config.inner.trajectory.replace("auto", "store")
    inner = dataclasses.replace(config.inner, trajectory=trajectory, remat="mini_batch")
    return dataclasses.replace(config, inner=inner)


def prefix_by_sequence(config: Config, mesh: Mesh) -> bool:
    """Whether the prefix divides positions over the `model` axis, and not matrices; logs what it took and why.

    "auto" takes what a device receives less of in a step. Where the key/value heads do not divide evenly, every device
    would compute all of attention, and positions are divided whatever that moves.
    """
    model, num_parts = config.model, mesh.shape["model"]
    if num_parts == 1 or not model.num_prefix_blocks or config.train.seq_len % num_parts:
        return False
    if config.mesh.prefix == "matrices":
        return False
    obstacles = {s.mixer.obstacle("sequence axis"): s for s in abstract_transformer(model).prefix_stacks.values()}
    obstacle = next(filter(None, obstacles), "")
    if config.mesh.prefix == "sequence":
        if obstacle:
            raise UserError(f"config.mesh.prefix is 'sequence', but a mixer of {model.mixer!r} {obstacle}")
        return True
    if obstacle:
        return False
    parts = config.train.accumulation_steps * mesh.shape["data"]
    sequences = max(1, config.train.global_batch_size // parts)
    received = {name: prefix_bytes(config, sequences, num_parts, name) for name in ("sequence", "matrices")}
    heads_divide = model.num_key_value_heads % num_parts == 0
    taken = min(received, key=received.get) if heads_divide else "sequence"
    logger.info(
        "mesh.prefix %s: a device receives %.2f GiB in a step by the sequence, %.2f GiB by the matrices%s",
        taken,
        *(received[name] / 2**30 for name in ("sequence", "matrices")),
        "" if heads_divide else f", which does not divide {model.num_key_value_heads} key/value heads",
    )
    return taken == "sequence"


def prefix_bytes(config: Config, sequences: int, num_parts: int, divided: str) -> float:
    """Bytes that a device receives over the `model` axis for the prefix, in one step with `sequences` sequences.

    Of the matrices: two sums of hidden states a block forwards, when it is rematerialised, and in reverse. Of the
    sequence: a block's weights forwards and again in reverse, their gradient in float32, and in all three passes over
    attention what sequence_parts.py says.
    """
    model, T = config.model, config.train.seq_len
    size, share = jnp.dtype(model.compute_dtype).itemsize, (num_parts - 1) / num_parts
    if divided == "matrices":
        return model.num_prefix_blocks * 6 * 2 * share * sequences * T * model.hidden_size * size
    stacks = abstract_transformer(model).prefix_stacks.values()
    parameters = [leaf for stack in stacks for leaf in jax.tree.leaves(nnx.state(stack))]
    num_weights = sum(leaf.size for leaf in parameters if leaf.ndim > 2)  # of all blocks: matrices, stacked
    fetched = share * num_weights * (2 * size + jnp.dtype(model.param_dtype).itemsize)
    numbers = sum(stack.mixer.received(T // num_parts, num_parts) for stack in stacks) / len(stacks)
    return fetched + model.num_prefix_blocks * 3 * sequences * numbers * size


def free_bytes(params, mesh: Mesh) -> int:
    """What a device of the mesh has for temporaries: its memory less its part of the state.

    Its memory is what it reports, on CPU half of the machine's, divided among its devices; of one that is not here,
    what is known of its kind. `params` are shapes; the parameters are taken to be divided among the devices.
    """
    device = mesh.devices.flat[0]
    here = device in jax.local_devices()
    reported = ((device.memory_stats() if here else None) or {}).get("bytes_limit")
    if reported is None:
        target = targets.of_device(device)
        reported = int(target.memory_bytes * USABLE.get(target.platform, 1))
    if not reported:
        reported = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // jax.local_device_count()
    state = STATE_COPIES * sum(math.prod(p.shape) * jnp.dtype(p.dtype).itemsize for p in jax.tree.leaves(params))
    return max(0, reported - state // mesh.size)
