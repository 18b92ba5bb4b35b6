"""Reads a compiled program's text (HLO of any platform): what runs how often, and what devices receive.

XLA's own cost analysis counts the body of a loop once, whatever its trip count, and is of no use for scans.
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
# "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}": groups along a of a mesh of devices, numbered in another order
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Array(NamedTuple):
    """An array's type."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes; 0 of what is no array of numbers."""
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
        """Of the result, those of nested tuples in a row."""
        return arrays(self.result)

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        parts = split("(" + self.rest[: _closing(self.rest)] + ")")
        return [part.split()[-1].rpartition("/")[2].lstrip("%") for part in parts if part.strip()]

    @property
    def op_name(self) -> str:
        """What of the traced program it stems from."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""


class Collective(NamedTuple):
    """One instruction by which devices exchange data."""

    kind: str
    axis: str  # of the mesh, joined by + where it runs over several
    received_bytes: float  # by each device, all runs together
    times: int
    op_name: str


class Program:
    """A program's computations, and how often each runs."""

    def __init__(self, text: str):
        self.computations, entry = _computations(text)
        self.unknown_trips = 0  # loops whose trip count XLA does not know: they count once
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
        """Yields (computation, instruction, how often it runs) of all that run."""
        for name, instructions in self.computations.items():
            if self.times[name]:
                for instruction in instructions:
                    yield name, instruction, self.times[name]

    def _calls(self, instruction: Instruction) -> list[tuple[str, int]]:
        """The computations that it runs, and how often. (The end of what runs asynchronously repeats its start's.)"""
        rest = instruction.rest
        if instruction.op in ("async-done", "async-update"):
            return []
        if instruction.op == "while":
            return [(_BODY.search(rest)[1], self._trips(rest))]
        branches = [name.strip().lstrip("%") for found in _BRANCHES.findall(rest) for name in found.split(",")]
        return [(name, 1) for name in _CALLED.findall(rest) + branches]

    def _trips(self, rest: str) -> int:
        """How often a loop runs: as XLA says, else (for TPUs, and before XLA) as far as the condition has it count."""
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
    """What devices exchange in one run of a program, loops multiplied out, what moves most first.

    mesh_shape: size of each axis by name, as of `Mesh.shape`; devices are numbered along the last axis first.
    """
    return exchanged(Program(text), mesh_shape)


def exchanged(program: Program, mesh_shape) -> list[Collective]:
    """The same of a program that was read.

    Received, as a ring does it among n devices: all-gather (n-1)/n of the result, reduce-scatter (n-1)/n of the
    operand, all-reduce twice that, all-to-all (n-1)/n, a permutation all of it.
    """
    found = []
    for computation, instruction, times in program.instructions():
        kind = instruction.op.removesuffix("-start")
        if computation.startswith("all-reduce-scatter"):  # the form that a reduce-scatter has on TPUs
            kind = kind.replace("all-reduce", "reduce-scatter")
        if kind in COLLECTIVES:
            groups = _groups(instruction.rest, prod(mesh_shape.values()))
            received = times * _received(instruction, kind, groups.shape[1])
            if received and len(groups):
                found.append(Collective(kind, _axis(groups, mesh_shape), received, times, instruction.op_name))
    return sorted(found, key=lambda c: -c.received_bytes)


def arrays(text: str) -> list[Array]:
    """The arrays of a type."""
    return [Array(dtype, sizes(dims)) for dtype, dims in _ARRAY.findall(text)]


def sizes(text: str) -> tuple[int, ...]:
    """Integers that commas separate."""
    return tuple(int(size) for size in text.split(",") if size)


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str | None]:
    """All computations by name, and the name of the one that is the program."""
    found, entry, current = {}, None, None
    for line in text.splitlines():
        if line and not line[0].isspace():
            if header := _COMPUTATION.match(line):
                current = found.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.append(Instruction(*instruction.groups()))
    return found, entry


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened before the text."""
    depth = 1
    for at in re.finditer(r"[()]", text):
        depth += 1 if at[0] == "(" else -1
        if not depth:
            return at.start()
    return len(text)


def split(result: str) -> list[str]:
    """What commas separate in parentheses, nested ones whole."""
    found, depth, begin = [], 0, 1
    for i, c in enumerate(result):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or (depth == 0 and i == len(result) - 1):
            found.append(result[begin:i])
            begin = i + 1
    return found


def _received(instruction: Instruction, kind: str, n: int) -> float:
    """Bytes that a device of a group of n receives in one run."""
    result = operand = instruction.result
    if (
        instruction.op.endswith("-start") and kind != "all-reduce"
    ):  # whose result is the operands, the results, and more
        operand, result = split(instruction.result)[:2]
    size = sum(array.size for array in arrays(result))
    if kind == "collective-permute":
        return size
    if kind == "collective-broadcast":
        return size if n > 1 else 0
    if kind == "reduce-scatter" and "all-reduce" not in instruction.op:
        size = sum(array.size for array in arrays(operand)) if operand is not result else size * n
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _groups(rest: str, num_devices: int) -> np.ndarray:
    """The groups of devices that exchange data [groups, n]; of a permutation, its pairs of different devices."""
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        pairs = np.array([sizes(pair) for pair in re.findall(r"\{([\d,]+)", found[1])])
        return pairs[pairs[:, 0] != pairs[:, 1]]
    if found := re.search(r"replica_groups=\{(\{.*?\})?\}", rest):
        return np.array([sizes(group) for group in re.findall(r"\{([\d,]+)\}", found[0])] or [range(num_devices)])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _iota(sizes(found[2]), sizes(found[3] or "")).reshape(sizes(found[1]))
    if found := _MESH_GROUPS.search(rest):
        axes, dims, order, over = found.groups()
        positions = _mesh_groups(axes, over)
        return _iota(sizes(dims), sizes(order or "")).ravel()[positions] if dims else positions
    raise ValueError(f"groups of devices in a form that is not known: {rest[:500]}")


def _iota(dims: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    numbers = np.arange(prod(dims)).reshape(dims)
    return numbers.transpose(order) if order else numbers


def _mesh_groups(axes: str, over: str) -> np.ndarray:
    """Of "'a'=4,'b'=2" and "'b'": groups along b. "'a':(2)2" is the part of a with 2 before it, of size 2."""
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
    """The axes of the mesh along which the devices of a group differ."""
    coordinates = np.unravel_index(groups, tuple(mesh_shape.values()))
    return "+".join(name for name, at in zip(mesh_shape, coordinates) if (at != at[:, :1]).any()) or "none"
