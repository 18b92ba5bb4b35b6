"""What the bench reports about the machine code of the Hopper kernels; the compiler's part where it is installed."""

import json
import shutil

import pytest

from ttt_e2e.bench import kernel_code, mosaic_compiler
from ttt_e2e.errors import UserError

PRINTED = """
	setmaxnreg.inc.sync.aligned.u32 	240;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;
	setmaxnreg.dec.sync.aligned.u32 	24;
ptxas info    : Compiling entry function 'dual_mosaic_gpu_kernel' for 'sm_90a'
    16 bytes stack frame, 16 bytes spill stores, 52 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 16 bytes cumulative stack size, 1 bytes smem
"""
FIGURES = {"registers": 240, "spill_store_bytes": 16, "spill_load_bytes": 52, "matrix_instructions": 1}
SMALL = {"head_dims": (64,), "seq_len": 128, "cached": 128, "window": 128}


def test_a_row_of_every_kernel_of_a_pass(tmp_path, monkeypatch):
    def compile_modules(modules):
        assert len(modules) == 2 and b"reverse_queries" in modules[0] and b"reverse_keys" in modules[1]
        return [PRINTED.replace("dual", "reverse_queries"), PRINTED.replace("dual", "reverse_keys")]

    monkeypatch.setattr(mosaic_compiler, "compile_modules", compile_modules)
    rows = kernel_code.run(tmp_path, variants=("reverse",), **SMALL)
    assert [row["variant"] for row in rows] == ["mosaic_gpu/reverse_queries", "mosaic_gpu/reverse_keys"]
    assert all(row.items() >= FIGURES.items() for row in rows)
    assert rows == json.loads((tmp_path / "results.json").read_text())


def test_a_kernel_that_starts_with_its_registers_has_those():
    text = PRINTED.replace("setmaxnreg.inc", "nothing").replace("Used 168", "Used 255")
    assert kernel_code._figures(text) == ("dual", FIGURES | {"registers": 255})


def test_unknown_passes_are_named(tmp_path):
    with pytest.raises(UserError, match="--variants=backward: legal are forward, tangent, dual"):
        kernel_code.run(tmp_path, variants=("backward",))


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(mosaic_compiler, "plugin", lambda: None)
    with pytest.raises(UserError, match=r"pip install 'ttt-e2e\[cuda\]'"):
        mosaic_compiler.compile_modules([b""])


def test_no_driver_and_no_c_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(mosaic_compiler, "plugin", lambda: tmp_path)
    monkeypatch.setattr(mosaic_compiler, "_has_driver", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"neither a GPU with its driver \(libcuda.so.1\) nor a C compiler"):
        mosaic_compiler.compile_modules([b""])


with_compiler = pytest.mark.skipif(mosaic_compiler.plugin() is None, reason="JAX's CUDA plugin is not installed")


@with_compiler
def test_the_compiler_says_it_of_a_kernel(tmp_path):
    [row] = kernel_code.run(tmp_path, variants=("forward",), **SMALL)
    assert row["variant"] == "mosaic_gpu/forward" and row["registers"] == 240 and row["spill_store_bytes"] == 0
    assert row["matrix_instructions"] == 8  # two products of 64 x 64 x 64, 16 deep each


@with_compiler
def test_a_module_that_the_compiler_refuses_is_one_line():
    with pytest.raises(UserError, match="failed at kernel 1: "):
        mosaic_compiler.compile_modules([b"no module"])
