"""What a function compiled for the machine here does, takes, and how long: what benchmarks measure."""

import time
from typing import NamedTuple

import jax

from ttt_e2e.targets.products import matmul_flops


class Measured(NamedTuple):
    """A function compiled for its arguments, and what that program does."""

    call: jax.stages.Compiled
    flops: int  # of its matrix products
    temp_bytes: int  # peak, besides arguments and results
    trace_seconds: float  # by JAX, lowering included
    compile_seconds: float  # by XLA


def measure(function, *arguments) -> Measured:
    """Compiles a function of arrays, or of their shapes, and counts."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    seconds = (traced - start, time.perf_counter() - traced)
    return Measured(compiled, matmul_flops(compiled.as_text()), compiled.memory_analysis().temp_size_in_bytes, *seconds)


def seconds_per_call(function, *arguments, repeats: int = 5) -> float:
    """The least of `repeats` wall times, after one call that is not counted."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
