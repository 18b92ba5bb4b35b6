"""Counts the FLOPs of a compiled program's matrix products, which each platform's compiler writes in its own way.

CPU: `dot`. NVIDIA: `dot` in fusions, calls of cuBLAS (triangular systems, too), and cuDNN's attention. TPU:
`convolution`, and Pallas kernels that declare their cost. A multiplication and an addition count as two.
"""

import re
from functools import cache
from math import prod

import numpy as np

from ttt_e2e.targets import marks
from ttt_e2e.targets.program import Array, Instruction, Program, sizes

GEMM = "__cublas"  # beginning of the targets of cuBLAS's calls
TRIANGULAR = "__cublas$triangularSolve"
ATTENTION_PRODUCTS = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}  # products of queries by keys in size
_KERNELS = re.compile(r"^__cu|mosaic|triton|tpu_custom_call")  # CUDA's libraries, Pallas
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CONTRACTED = (
    re.compile(r"lhs_contracting_dims=\{([\d,]*)\}"),
    re.compile(r'"lhs_contracting_dimensions":\s*\[([\d," ]*)\]'),  # in a backend_config
)
_DECLARED = re.compile(r'"cost_estimate":\s*\{"flops":\s*"?(\d+)')


def matmul_flops(program: Program | str) -> int:
    """FLOPs of all matrix products in one run of a program, or of its text; what a loop repeats counts every time.

    A loop whose trip count is not known counts once; both branches of a condition count. Kernels that do not declare
    their cost count 0: `uncounted` names them.
    """
    program = Program(program) if isinstance(program, str) else program
    arrays_of, current, total = {}, None, 0
    for computation, instruction, times in program.instructions():
        if computation != current:  # instructions come one computation after the other, operands before their users
            arrays_of, current = {}, computation
        arrays_of[instruction.name] = arrays = instruction.arrays
        if count := _COUNTS.get(instruction.op):
            operands = [arrays_of[name][0] for name in instruction.operands if arrays_of.get(name)]
            total += times * count(instruction, arrays[0] if arrays else None, operands)
    return total


def kernels(program: Program) -> dict[str, int]:
    """{name: how often it runs} of the kernels that XLA did not generate: those of CUDA's libraries and of Pallas."""
    runs = {}
    for _, instruction, times in program.instructions():
        target = call_target(instruction)
        if _KERNELS.search(target):
            name = _kernel_name(instruction, target)
            runs[name] = runs.get(name, 0) + times
    return dict(sorted(runs.items()))


def uncounted(program: Program) -> list[str]:
    """Names of the kernels whose cost is stated nowhere in the program, so that `matmul_flops` counts them as 0."""
    names = set()
    for _, instruction, _ in program.instructions():
        target = call_target(instruction)
        declares = _DECLARED.search(instruction.rest) or marks.read(instruction.op_name)
        is_counted = target.startswith(GEMM) or target in ATTENTION_PRODUCTS or declares
        if _KERNELS.search(target) and not is_counted:
            names.add(_kernel_name(instruction, target))
    return sorted(names)


def call_target(instruction: Instruction) -> str:
    """The target of a custom call; "" for other instructions."""
    match = _TARGET.search(instruction.rest) if instruction.op == "custom-call" else None
    return match[1] if match else ""


def _dot(instruction: Instruction, result: Array, operands: list[Array]) -> int:
    """FLOPs of a `dot`, or of a call of cuBLAS."""
    left = operands[0].shape
    dims = next(match[1] for pattern in _CONTRACTED if (match := pattern.search(instruction.rest)))
    contracted = sizes(dims.replace('"', "").replace(" ", ""))
    return 2 * prod(result.shape) * prod(left[i] for i in contracted)


def _call(instruction: Instruction, result: Array, operands: list[Array]) -> int:
    """FLOPs of a custom call: of cuBLAS, of cuDNN's attention, or of a kernel that states its cost; else 0."""
    target = call_target(instruction)
    if target == TRIANGULAR:  # each of the n unknowns of a column is a sum over those before it
        return prod(result.shape) * operands[0].shape[-1]
    if target.startswith(GEMM):
        return _dot(instruction, result, operands)
    if target in ATTENTION_PRODUCTS:
        dims = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([\d," ]*)\]', instruction.rest)[1]
        *heads, T, S = sizes(dims.replace('"', "").replace(" ", ""))
        window = int((re.search(r'"sliding_window_length":\s*"?(\d+)', instruction.rest) or [0, 0])[1])
        causal = '"CAUSAL"' in instruction.rest
        width = operands[0].shape[-1]
        return 2 * ATTENTION_PRODUCTS[target] * prod(heads) * width * _visible(T, S, window if causal else 0, causal)
    if marked := marks.read(instruction.op_name):
        return marked[1]
    declared = _DECLARED.search(instruction.rest)
    return int(declared[1]) if declared else 0


def _visible(T: int, S: int, window: int, causal: bool) -> int:
    """Number of (query, key) pairs that are not masked: T queries, the last of S positions, each with the `window`
    most recent keys (0 = all).
    """
    if not causal:
        return T * S
    window = min(window or S, S)
    full = max(0, T - max(0, window - (S - T)))  # queries that see a whole window
    rest = T - full
    return full * window + rest * (S - T) + rest * (rest + 1) // 2


def _convolution(instruction: Instruction, result: Array, operands: list[Array]) -> int:
    """FLOPs of a convolution, counted as XLA does: without products with padding or with the zeros of a dilation."""
    inputs, kernel, outputs = re.split("_|->", re.search(r"dim_labels=([\w>\-]+)", instruction.rest)[1])
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.rest) or ["", ""])[1]))
    spatial = [label for label in inputs if label.isdigit()]
    left, right = operands[0].shape, operands[1].shape

    def numbers(name: str, default: int) -> list[int]:
        return [int(n) for n in window[name].split("x")] if name in window else [default] * len(spatial)

    pads = [int(pair.split("_")[0]) for pair in window["pad"].split("x")] if "pad" in window else [0] * len(spatial)
    positions = prod(
        _meetings(left[inputs.index(label)], right[kernel.index(label)], result.shape[outputs.index(label)], *of)
        for label, *of in zip(
            spatial, numbers("stride", 1), pads, numbers("lhs_dilate", 1), numbers("rhs_dilate", 1), strict=True
        )
    )
    batch_groups = int((re.search(r"batch_group_count=(\d+)", instruction.rest) or [0, 1])[1])
    others = result.shape[outputs.index("b")] * result.shape[outputs.index("f")] // batch_groups
    return 2 * positions * others * right[kernel.index("i")]


@cache
def _meetings(size: int, window: int, results: int, stride: int, pad: int, holes: int, step: int) -> int:
    """Number of (result, position of its window) pairs, along one dimension, that read an element of the input.

    `holes` - 1 zeros stand between two elements of the input (lhs_dilate), and positions of the window are `step` apart
    (rhs_dilate).
    """
    starts = np.arange(results) * stride - pad
    total = 0
    for k in range(window):
        at = starts + k * step
        total += np.count_nonzero((at >= 0) & (at % holes == 0) & (at < size * holes))
    return int(total)


def _kernel_name(instruction: Instruction, target: str) -> str:
    """The custom call's target, followed by the name of the Pallas kernel, where there is one."""
    if marked := marks.read(instruction.op_name):
        return f"{target}:{marked[0]}"
    named = re.search(r'"?kernel_name"?\s*[:=]\s*"?([\w.\-]+)', instruction.rest)
    if named:
        return f"{target}:{named[1]}"
    return target


_COUNTS = {"dot": _dot, "custom-call": _call, "convolution": _convolution}
