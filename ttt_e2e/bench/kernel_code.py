"""`ttt-e2e bench kernel_code`: registers, spills and matrix instructions of the Hopper kernels' machine code.

Compiled, not run: it takes no GPU. Shapes: those of kernels/attention/xla.py.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from ttt_e2e.bench import mosaic_compiler, table
from ttt_e2e.bench.attention_check import PASSES, pass_operands
from ttt_e2e.errors import UserError
from ttt_e2e.kernels.attention.hopper import passes
from ttt_e2e.progress import progress_bar


def run(
    output,
    *,
    variants=PASSES,
    head_dims=(64, 80, 128),
    dtype: str = "bfloat16",
    seq_len: int = 1024,
    cached: int = 8192,
    window: int = 8192,
) -> list[dict]:
    """Compiles the kernels of every pass, writes the figures to the directory `output`, returns the rows.

    A row is one kernel: `registers` that a thread which computes may use, `spill_store_bytes` and `spill_load_bytes`
    of a thread, and `matrix_instructions`, how many wgmma stand in its code. `variants` are passes.
    """
    for name in variants:
        if name not in PASSES:
            raise UserError(f"--variants={name}: legal are {', '.join(PASSES)}")
    modules, sizes = [], []
    cases = [(H, name) for H in head_dims for name in variants]
    for H, name in progress_bar(cases, desc="bench kernel_code: lowering", unit="pass"):
        case = {"seq_len": seq_len, "cached": cached, "window": window, "head_dim": H, "dtype": dtype}
        for module in kernels(name, **case):
            modules.append(module)
            sizes.append(case)
    rows = []
    for text, case in zip(mosaic_compiler.compile_modules(modules), sizes, strict=True):
        name, figures = _figures(text)
        rows.append({"variant": f"mosaic_gpu/{name}"} | case | figures)
    print(table.write(output, rows, "Machine code of the Hopper kernels"))
    return rows


def kernels(name: str, *, seq_len: int, cached: int, window: int, head_dim: int, dtype: str) -> list[bytes]:
    """The kernels of a pass, as their compiler takes them; gradients are of all keys, tangents of the new ones."""

    def array(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct((1, 1, *sizes), dtype)

    rows, statistics = array(1, seq_len, head_dim), array(1, seq_len, dtype=jnp.float32)
    keys, new = array(cached + seq_len, head_dim), array(seq_len, head_dim)
    x, y = (rows, keys, keys, jax.ShapeDtypeStruct((1,), jnp.int32)), (rows, new, new)
    operands = jax.eval_shape(partial(pass_operands, window=window), x, y, (rows, statistics) * 2)[name]
    options = {"num_keys": cached + seq_len} if "reverse" in name else {}
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(partial(getattr(passes, name), window=window, **options)).trace(*operands)
        lowered = traced.lower(lowering_platforms=("cuda",))
    return [op.attributes["mhlo.backend_config"]["module"].value_bytes for op in _mosaic_calls(lowered)]


def _figures(text: str) -> tuple[str, dict]:
    """A kernel's name and its figures, from what the compiler prints."""

    def number(pattern):
        return int(re.search(pattern, text)[1])

    more = re.search(r"setmaxnreg\.inc\.sync\.aligned\.u32 *\t*(\d+)", text)  # than the kernel is started with
    return re.search(r"entry function '(\w+)_mosaic_gpu", text)[1], {
        "registers": int(more[1]) if more else number(r"Used (\d+) registers"),
        "spill_store_bytes": number(r"(\d+) bytes spill stores"),
        "spill_load_bytes": number(r"(\d+) bytes spill loads"),
        "matrix_instructions": text.count("wgmma.mma_async"),
    }


def _mosaic_calls(lowered):
    """The operations of a lowered program that are Mosaic GPU kernels."""

    def walk(operation):
        for region in operation.regions:
            for block in region:
                for op in block:
                    yield op.operation
                    yield from walk(op.operation)

    for op in walk(lowered.compiler_ir("stablehlo").operation):
        if op.name == "stablehlo.custom_call" and "mosaic_gpu" in str(op.attributes["call_target_name"]):
            yield op
