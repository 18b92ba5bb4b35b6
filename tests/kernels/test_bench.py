"""The benchmark of window attention, and the counters that it shares with other benchmarks."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from ttt_e2e.bench import attention_check, compiled, window_attention
from ttt_e2e.errors import UserError
from ttt_e2e.kernels.attention import xla
from ttt_e2e.kernels.attention.hopper import passes as mosaic_gpu


def test_matrix_products_in_loops_and_batches_are_counted():
    x, batch = jnp.ones((8, 16)), jnp.ones((5, 16, 4))

    def program(x, batch):
        def step(carry, _):
            return jnp.tanh(carry @ (x.T @ x)), ()

        looped, _ = jax.lax.scan(step, x, length=7)
        return looped, jnp.einsum("ij,bjk->bik", x, batch)

    measured = compiled.measure(program, x, batch)
    invariant = 2 * 16 * 8 * 16  # XLA may take it out of the loop
    rest = 7 * 2 * 8 * 16 * 16 + 2 * 5 * 8 * 16 * 4
    assert measured.flops in (rest + invariant, rest + 7 * invariant)
    assert measured.temp_bytes > 0 and measured.compile_seconds > 0


def test_writes_rows_a_table_and_the_environment(tmp_path):
    sizes = {"seq_lens": (16,), "cached_lens": (0, 16), "windows": (16,), "head_dims": (4,), "num_heads": 1}
    rows = window_attention.run(tmp_path, **sizes, variants=("xla",), repeats=1)
    assert rows == json.loads((tmp_path / "results.json").read_text())
    assert [row["variant"] for row in rows] == 2 * [f"xla/{name}" for name in window_attention.PASSES]
    assert all(row["step_seconds"] > 0 and row["flops"] > 0 and row["temp_bytes"] > 0 for row in rows)
    table = (tmp_path / "results.md").read_text()
    assert table.count("\n| xla/") == 8
    assert json.loads((tmp_path / "environment.json").read_text())["jax"] == jax.__version__


def test_an_unknown_variant_is_an_error(tmp_path):
    with pytest.raises(UserError, match="legal are reference, xla"):
        window_attention.run(tmp_path, variants=("dense",))


SMALL = {"head_dims": (16,), "dtypes": ("bfloat16",), "seq_len": 40, "cached": 60, "window": 50, "batch": 1}


def test_errors_of_attention_are_in_terms_of_those_of_xla(tmp_path):
    rows = attention_check.run(tmp_path, **SMALL, variants=("xla", "cudnn"))
    assert [row["variant"] for row in rows] == [f"xla/{name}" for name in attention_check.PASSES] + ["cudnn/all"]
    assert all(0 < row["relative_error"] < 0.01 and row["ratio"] == 1 for row in rows[:-1])
    assert rows[-1]["skipped"] == "needs an NVIDIA GPU"
    assert rows == json.loads((tmp_path / "results.json").read_text())


def test_a_wrong_pass_fails_the_check_and_is_in_the_table(tmp_path, monkeypatch):
    def wrong(*operands, **options):
        q_bar, *others = xla.reverse(*operands, **options)
        return 1.1 * q_bar, *others

    broken = types.SimpleNamespace(**{name: getattr(xla, name) for name in attention_check.PASSES} | {"reverse": wrong})
    monkeypatch.setattr(attention_check.backends, "load", lambda name: broken)
    with pytest.raises(UserError, match=r"wrong, see .*xla/reverse \(bfloat16, head width 16\)$"):
        attention_check.run(tmp_path, **SMALL, variants=("xla",))
    assert "| xla/reverse |" in (tmp_path / "results.md").read_text()


def test_a_pass_that_does_not_compile_fails_the_check_and_is_logged_whole(tmp_path, monkeypatch, caplog):
    def refused(*_, **__):
        raise NotImplementedError("no such layout")

    broken = types.SimpleNamespace(**{name: getattr(xla, name) for name in attention_check.PASSES} | {"dual": refused})
    broken.can_interpret = lambda: True
    monkeypatch.setattr(attention_check.backends, "load", lambda name: broken)
    with pytest.raises(UserError, match=r"wrong, see .*mosaic_gpu/dual \(bfloat16, head width 16\)$"):
        attention_check.run(tmp_path, **SMALL, variants=("mosaic_gpu",))
    assert "no such layout" in (tmp_path / "results.md").read_text()
    assert "in refused" in caplog.text


def test_rates_are_compared_with_cudnns_best():
    def row(variant, seq_len, rate, **sizes):
        sizes = {"head_dim": 64, "dtype": "bfloat16"} | sizes
        return {"variant": variant, "seq_len": seq_len, "band_flops_per_second": rate} | sizes

    rows = [row("cudnn/forward", 8, 2.0), row("cudnn/forward", 16, 4.0), row("mosaic_gpu/forward", 8, 3.0)]
    rows += [row("mosaic_gpu/tangent", 8, 3.0), row("xla/forward", 8, 1.0, head_dim=80)]
    window_attention._compare(rows, "cudnn")
    assert [row.get("rate_vs_cudnn") for row in rows] == [0.5, 1, 0.75, None, None]


@pytest.mark.slow
@pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="JAX interprets these kernels from 0.11.2 on")
def test_kernels_can_be_checked_and_measured_without_a_gpu(tmp_path):
    """As `launch/gpu_check.sh --rehearse` does."""
    rows = attention_check.run(tmp_path / "check", **SMALL, variants=("mosaic_gpu",))
    assert all(0 < row["ratio"] < attention_check.MAX_RATIO for row in rows)
    sizes = {"seq_lens": (64,), "cached_lens": (64,), "windows": (64,), "head_dims": (16,), "dtypes": ("bfloat16",)}
    rows = window_attention.run(tmp_path / "time", **sizes, num_heads=1, variants=("mosaic_gpu",), repeats=1)
    assert [row["variant"] for row in rows] == [f"mosaic_gpu/{name}" for name in window_attention.PASSES]
