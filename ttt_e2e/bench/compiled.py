"""What a compiled program does: the FLOPs of its matrix products, and the memory it takes besides its arguments.

XLA's own cost analysis counts the body of a loop once, whatever its trip count, and is of no use for scans.
"""

import re
import time
from math import prod
from typing import NamedTuple

import jax

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = \(?\w+\[([\d,]*)\]")
_DOT = re.compile(r" dot\((?:\w+\[([\d,]*)\]\S* )?%?([\w.\-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_BODY = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


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


def matmul_flops(hlo: str) -> int:
    """Multiplications and additions of all `dot`s in a program's text, loop bodies times their trip counts.

    A loop whose trip count XLA does not know counts once. Products that a platform turns into calls of its library
    are not `dot`s: the count is for programs compiled for CPU, where they stay.
    """
    own, called, entry = _read(hlo)
    totals = {}

    def total(name):
        if name not in totals:
            totals[name] = own.get(name, 0) + sum(times * total(callee) for callee, times in called.get(name, ()))
        return totals[name]

    return total(entry)


def _read(hlo: str):
    """FLOPs of each computation's own dots; what it calls, and how often; the computation that is the program."""
    own, called, shapes, entry, current = {}, {}, {}, None, None
    for line in hlo.splitlines():
        if not line.startswith(" ") and (header := _COMPUTATION.match(line)):
            current = header.group(2)
            own[current], called[current], shapes = 0, [], {}
            entry = current if header.group(1) else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if current is None or not instruction:
            continue
        shapes[instruction.group(1)] = _sizes(instruction.group(2))
        if dot := _DOT.search(line):
            left = _sizes(dot.group(1)) if dot.group(1) is not None else shapes[dot.group(2)]
            contracted = _sizes(_CONTRACTED.search(line).group(1))
            own[current] += 2 * prod(_sizes(instruction.group(2))) * prod(left[i] for i in contracted)
        called[current] += _calls(line)
    return own, called, entry


def _calls(line: str) -> list[tuple[str, int]]:
    if body := _BODY.search(line):
        trips = _TRIPS.search(line)
        return [(body.group(1), int(trips.group(1)) if trips else 1)]
    branches = [name.strip().lstrip("%") for found in _BRANCHES.findall(line) for name in found.split(",")]
    return [(name, 1) for name in _CALLED.findall(line) + branches]


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]
