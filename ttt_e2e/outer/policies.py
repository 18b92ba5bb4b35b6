"""What the memory of the devices here allows: the policies that "auto" stands for in a run."""

import dataclasses
import logging
import math
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ttt_e2e.config import Config
from ttt_e2e.inner import memory

logger = logging.getLogger(__name__)

STATE_COPIES = 4  # of the parameters that live through a step: they, their gradient, and AdamW's two moments


def for_training(config: Config, graphdef, params, mesh: Mesh) -> Config:
    """Replaces "auto" in `inner.trajectory` and `inner.remat`; logs what it took and why.

    graphdef, params: the model's structure, and the shapes of {"fast", "slow"}.
    """
    inner = config.inner
    if "auto" not in (inner.trajectory, inner.remat):
        return config
    parts = config.train.accumulation_steps * mesh.shape["data"]
    tokens = jax.ShapeDtypeStruct(
        (max(1, config.train.global_batch_size // parts), config.train.seq_len + 1), jnp.int32
    )
    budget = inner.memory_budget_bytes or free_bytes(params, mesh.size)
    chosen, needed = memory.choose(inner, graphdef, params["fast"], params["slow"], tokens, budget)
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


def free_bytes(params, num_devices: int) -> int:
    """What a device reports to have (on CPU: half of the machine's memory, divided among its devices), less the state.

    params: shapes of the parameters, which are taken to be divided among the devices.
    """
    device = jax.local_devices()[0]
    reported = (device.memory_stats() or {}).get("bytes_limit")
    if reported is None:
        reported = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // jax.local_device_count()
    state = STATE_COPIES * sum(math.prod(p.shape) * jnp.dtype(p.dtype).itemsize for p in jax.tree.leaves(params))
    return max(0, reported - state // num_devices)
