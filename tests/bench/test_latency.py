"""The benchmark of reading and generating, at toy sizes: it runs, counts, and names what it measured."""

import json
from itertools import pairwise

import jax
import numpy as np
import pytest

from tests.inference.conftest import learning_model, reader_of
from ttt_e2e.bench import latency
from ttt_e2e.cli import main

b, LENGTHS = 4, (8, 16, 32)
CONFIG = """
from ttt_e2e.config import default_config

def get_config(arg="e2e"):
    config = default_config()
    config.model.update(vocab_size=19, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    config.model.update(sliding_window=0 if arg == "full" else 8, num_fast_blocks=1 if arg == "e2e" else 0)
    config.inner.mini_batch_size = 4
    return config
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The rows of all three kinds of model by variant, and the directory with the files."""
    directory = tmp_path_factory.mktemp("latency")
    path = directory / "config.py"
    path.write_text(CONFIG)
    configs = tuple(f"{path}:{kind}" for kind in ("e2e", "window", "full"))
    rows = latency.run(directory, configs=configs, context_lengths=LENGTHS, new_tokens=3, repeats=1)
    return {name.rpartition(":")[2]: [row for row in rows if row["variant"] == name] for name in configs}, directory


def test_rows_are_variants_at_every_length_with_figures(results):
    rows, directory = results
    written = json.loads((directory / "results.json").read_text())
    assert written == [row for of_variant in rows.values() for row in of_variant]
    for of_variant in rows.values():
        assert [row["context_length"] for row in of_variant] == list(LENGTHS)
        assert all(value > 0 for row in of_variant for name, value in row.items() if name != "variant")
    text = (directory / "results.md").read_text()
    assert text.count("costs less per token than") == 2  # reading and generating


def test_costs_grow_with_the_context_for_full_attention_only(results):
    rows, _ = results
    counted = ("state_bytes", "peak_bytes", "prefill_flops_per_token", "decode_flops_per_token")
    for name in counted:
        for kind in ("e2e", "window"):
            assert len({row[name] for row in rows[kind]}) == 1, (kind, name)
        assert all(a[name] < z[name] for a, z in pairwise(rows["full"])), name


@pytest.mark.parametrize("fields", [{}, {"num_fast_blocks": 0, "sliding_window": 0}], ids=["window", "full"])
def test_state_bytes_are_those_of_a_saved_state(fields):
    reader = reader_of(learning_model(compute_dtype="bfloat16", param_dtype="float32", **fields), max_length=64)
    state, _ = reader.read(reader.start(1, 2), np.full((2, 16), 3))
    arrays = jax.tree.leaves(state)
    assert latency.state_bytes(state) == sum(a.size * a.dtype.itemsize for a in arrays)
    model, K = reader.config.model, 16 if fields else 6
    keys_and_values = 2 * 3 * 2 * (K + reader.mini_batch_size) * model.num_key_value_heads * model.head_dim * 2
    fast = 2 * sum(w.size * 4 for w in jax.tree.leaves(reader.params["fast"]))
    assert latency.state_bytes(state) == fast + keys_and_values + 2 * reader.mini_batch_size * 4 + 8


@pytest.mark.parametrize(
    "costs, expected",
    [
        ([2.0, 2.0, 2.0], 15.0),  # others 1, 3, 5: halfway between the first two
        ([0.5, 0.5, 0.5], 10.0),  # cheaper from the first
        ([6.0, 6.0, 6.0], None),  # never
        ([0.5, 4.0, 4.0], 30.0),  # cheaper, dearer, cheaper: the last change counts
        ([1.0, 1.0, 1.0], 10.0),  # as dear as the first: cheaper from there on
    ],
)
def test_crossover_is_interpolated_from_the_last_change(costs, expected):
    assert latency.crossover([10, 20, 40], costs, [1.0, 3.0, 5.0]) == expected


BAD_INPUT = {
    "--configs=e2x": "--configs=e2x: it takes config files, FILE.py[:ARG], and e2e, e2e_hybrid, window, full",
    "--configs=no.py": "config file no.py does not exist",
    "--configs=": "--configs is empty",
    "--context_lengths=100": "--context_lengths=100: it takes multiples of 64, the mini-batch of e2e",
    "--context_lengths=0": "--context_lengths=0",
    "--context_lengths=": "--context_lengths is empty",
    "--context_lengths=many": "--context_lengths=many: it takes integers",
    "--new_tokens=0": "--new_tokens is 0, but it must be at least 1",
    "--batch=0": "--batch is 0",
    "--repeats=0": "--repeats is 0",
}


@pytest.mark.parametrize("flag", BAD_INPUT)
def test_bad_flags_are_one_line(flag, tmp_path, capsys):
    assert main(["bench", "latency", f"--output={tmp_path / 'out'}", flag]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert BAD_INPUT[flag] in err
    assert not (tmp_path / "out").exists()
