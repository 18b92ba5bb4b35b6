"""Measures functions compiled for this machine: FLOPs, memory, compile time, run time."""

import time
from typing import NamedTuple

import jax

from ttt_e2e.targets.products import matmul_flops


class Measured(NamedTuple):
    """A function compiled for its arguments, with figures of the compiled program."""

    call: jax.stages.Compiled
    flops: int  # of its matrix products
    temp_bytes: int  # peak, without arguments and results
    trace_seconds: float  # by JAX, lowering included
    compile_seconds: float  # by XLA


def measure(function, *arguments) -> Measured:
    """Compiles a function for `arguments`, arrays or shapes, and measures the program without running it."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    seconds = (lowered_at - start, time.perf_counter() - lowered_at)
    return Measured(compiled, matmul_flops(compiled.as_text()), compiled.memory_analysis().temp_size_in_bytes, *seconds)


def seconds_per_call(function, *arguments, repeats: int = 5) -> float:
    """The shortest of `repeats` wall times of a call, in seconds, after one call that is not counted."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
