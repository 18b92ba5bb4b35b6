"""Reads a compiled program's text (HLO of any platform): how often each instruction runs, and what devices receive.

XLA's own cost analysis counts the body of a loop once, whatever its trip count, which is wrong for scans.
"""

import re
from collections import defaultdict
from functools import cache
from math import prod
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
# "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}": groups along axis a of a mesh, whose devices are reordered
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Array(NamedTuple):
    """Dtype and shape of an array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in bytes; 0 for types without elements, such as tokens."""
        bits = 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or ["0"])[0])
        return prod(self.shape) * bits // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    result: str  # its type, or types in parentheses
    op: str
    rest: str  # operands, the closing parenthesis, attributes

    @property
    def arrays(self) -> list[Array]:
        """The arrays of the result, nested tuples flattened."""
        return arrays(self.result)

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        parts = split("(" + self.rest[: _closing(self.rest)] + ")")
        return [part.split()[-1].rpartition("/")[2].lstrip("%") for part in parts if part.strip()]

    @property
    def op_name(self) -> str:
        """Path of the traced operation that it comes from, such as "jit(step)/dot_general"; "" where there is none."""
        match = _OP_NAME.search(self.rest)
        return match[1] if match else ""


class Collective(NamedTuple):
    """One instruction that exchanges data between devices, with the bytes that it moves."""

    kind: str
    axis: str  # of the mesh, joined by + where it runs over several
    received_bytes: float  # by each device, all runs together
    times: int  # runs of the instruction
    op_name: str


class Program:
    """A compiled program: `computations`, by name, and how often each runs, `times`."""

    def __init__(self, text: str):
        self.computations, entry = _computations(text)
        self.unknown_trips = 0  # number of loops whose trip count is not known: these count once
        callers = defaultdict(list)
        for name, instructions in self.computations.items():
            for instruction in instructions:
                for callee, times in self._calls(instruction):
                    callers[callee].append((name, times))

        @cache
        def times(name: str) -> int:
            return (name == entry) + sum(times(caller) * n for caller, n in callers[name])

        self.times = {name: times(name) for name in self.computations}

    def instructions(self):
        """Yields (computation's name, instruction, how often it runs) of every instruction that runs."""
        for name, instructions in self.computations.items():
            if self.times[name]:
                for instruction in instructions:
                    yield name, instruction, self.times[name]

    def _calls(self, instruction: Instruction) -> list[tuple[str, int]]:
        """(Computation, how often) for the computations that one run of an instruction calls.

        The end of an asynchronous operation names the same computations as its start, and does not count.
        """
        rest = instruction.rest
        if instruction.op in ("async-done", "async-update"):
            return []
        if instruction.op == "while":
            return [(_BODY.search(rest)[1], self._trips(rest))]
        branches = [name.strip().lstrip("%") for names in _BRANCHES.findall(rest) for name in names.split(",")]
        return [(name, 1) for name in _CALLED.findall(rest) + branches]

    def _trips(self, rest: str) -> int:
        """Trip count of a loop: XLA's; else (on TPUs, and before XLA) the limit in the loop's condition; else 1."""
        if trips := _TRIPS.search(rest):
            return int(trips[1])
        condition = self.computations[_CONDITION.search(rest)[1]]
        limits = {i.name: i.rest.partition(")")[0] for i in condition if i.op == "constant"}
        if condition[-1].op == "compare" and "direction=LT" in condition[-1].rest:
            for operand in condition[-1].operands:
                if operand in limits:
                    return int(limits[operand])
        self.unknown_trips += 1
        return 1


def collectives(text: str, mesh_shape) -> list[Collective]:
    """The collectives in one run of a program, from its text; those that move most come first.

    mesh_shape: size of each axis by name, as of `Mesh.shape`; devices are numbered along the last axis first.
    """
    return exchanged(Program(text), mesh_shape)


def exchanged(program: Program, mesh_shape) -> list[Collective]:
    """The collectives of a `Program`, as `collectives` gives them from its text.

    Bytes received are those of a ring of n devices: all-gather (n-1)/n of the result, reduce-scatter (n-1)/n of the
    operand, all-reduce twice that, all-to-all (n-1)/n, a permutation all of it.
    """
    moved = []
    for computation, instruction, times in program.instructions():
        kind = instruction.op.removesuffix("-start")
        if computation.startswith("all-reduce-scatter"):  # the form that a reduce-scatter has on TPUs
            kind = kind.replace("all-reduce", "reduce-scatter")
        if kind in COLLECTIVES:
            groups = _groups(instruction.rest, prod(mesh_shape.values()))
            received = times * _received(instruction, kind, groups.shape[1])
            if received and len(groups):
                moved.append(Collective(kind, _axis(groups, mesh_shape), received, times, instruction.op_name))
    return sorted(moved, key=lambda c: -c.received_bytes)


def arrays(text: str) -> list[Array]:
    """The arrays in the text of a type, which may be a tuple."""
    return [Array(dtype, sizes(dims)) for dtype, dims in _ARRAY.findall(text)]


def sizes(text: str) -> tuple[int, ...]:
    """Parses integers separated by commas."""
    return tuple(int(size) for size in text.split(",") if size)


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str | None]:
    """({name: instructions} of all computations, name of the entry computation)."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if line and not line[0].isspace():
            if header := _COMPUTATION.match(line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.append(Instruction(*instruction.groups()))
    return computations, entry


def _closing(text: str) -> int:
    """Index of the parenthesis that closes one opened before the text."""
    depth = 1
    for at in re.finditer(r"[()]", text):
        depth += 1 if at[0] == "(" else -1
        if not depth:
            return at.start()
    return len(text)


def split(result: str) -> list[str]:
    """Splits the text of a tuple, "(a, (b, c))", at its outer commas: "a" and " (b, c)"."""
    parts, depth, begin = [], 0, 1
    for i, c in enumerate(result):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or (depth == 0 and i == len(result) - 1):
            parts.append(result[begin:i])
            begin = i + 1
    return parts


def _received(instruction: Instruction, kind: str, n: int) -> float:
    """Bytes that a device of a group of n receives in one run of a collective."""
    result = operand = instruction.result
    # The result of an asynchronous start is a tuple of the operands, the results, and more.
    if instruction.op.endswith("-start") and kind != "all-reduce":
        operand, result = split(instruction.result)[:2]
    size = sum(array.num_bytes for array in arrays(result))
    if kind == "collective-permute":
        return size
    if kind == "collective-broadcast":
        return size if n > 1 else 0
    if kind == "reduce-scatter" and "all-reduce" not in instruction.op:
        size = sum(array.num_bytes for array in arrays(operand)) if operand is not result else size * n
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _groups(rest: str, num_devices: int) -> np.ndarray:
    """The groups of devices that exchange data [groups, n]; for a permutation, its pairs of different devices."""
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        pairs = np.array([sizes(pair) for pair in re.findall(r"\{([\d,]+)", match[1])])
        return pairs[pairs[:, 0] != pairs[:, 1]]
    if match := re.search(r"replica_groups=\{(\{.*?\})?\}", rest):
        return np.array([sizes(group) for group in re.findall(r"\{([\d,]+)\}", match[0])] or [range(num_devices)])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _iota(sizes(match[2]), sizes(match[3] or "")).reshape(sizes(match[1]))
    if match := _MESH_GROUPS.search(rest):
        axes, dims, order, over = match.groups()
        positions = _mesh_groups(axes, over)
        return _iota(sizes(dims), sizes(order or "")).ravel()[positions] if dims else positions
    raise ValueError(f"groups of devices in a form that is not known: {rest[:500]}")


def _iota(dims: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    """0, 1, 2, ... of shape `dims`, its dimensions then permuted by `order`, unless that is empty."""
    numbers = np.arange(prod(dims)).reshape(dims)
    return numbers.transpose(order) if order else numbers


def _mesh_groups(axes: str, over: str) -> np.ndarray:
    """Positions in a mesh, in groups along some axes [groups, n]: of axes "'a'=4,'b'=2" over "'b'", four groups of two.

    An axis of `over` may be a part of a mesh axis: "'a':(2)2" splits a into 2 x 2 x the rest, and is the second part.
    """
    shape, along = [], []
    parts = {
        name: (int(pre or 1), int(size or 0)) for name, pre, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", over)
    }
    for name, size in re.findall(r"'(\w+)'=(\d+)", axes):
        before, part = parts.get(name, (1, 1))
        part = part or int(size)
        along.append(len(shape) + 1)
        shape += [before, part, int(size) // (before * part)]
    others = [i for i in range(len(shape)) if i not in along]
    return _iota(tuple(shape), (*others, *along)).reshape(-1, prod(shape[i] for i in along))


def _axis(groups: np.ndarray, mesh_shape) -> str:
    """The axes of the mesh along which the devices of a group differ, joined by +; "none" where they do not."""
    coordinates = np.unravel_index(groups, tuple(mesh_shape.values()))
    return "+".join(name for name, at in zip(mesh_shape, coordinates) if (at != at[:, :1]).any()) or "none"
