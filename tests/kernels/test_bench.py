"""The benchmark of window attention, and the counters that it shares with other benchmarks."""

import json

import jax
import jax.numpy as jnp
import pytest

from ttt_e2e.bench import compiled, window_attention
from ttt_e2e.errors import UserError


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
    with pytest.raises(UserError, match="legal are xla, reference"):
        window_attention.run(tmp_path, variants=("dense",))
