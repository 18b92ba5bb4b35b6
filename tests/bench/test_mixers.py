"""The benchmark of mixers, at toy sizes: it runs, counts, and names what it measured."""

import json

import pytest

from ttt_e2e.bench import mixers
from ttt_e2e.errors import UserError

SIZES = {"width": 16, "num_heads": 2, "mlp_width": 24, "num_blocks": 1, "vocab": 31, "window": 8, "mini_batch": 8}
LENGTHS = (16, 64)
NAMES = ("attention", "window", "gated_deltanet", "e2e")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{variant: its rows}, and the directory with the files."""
    directory = tmp_path_factory.mktemp("mixers")
    rows = mixers.run(directory, mixers=NAMES, lengths=LENGTHS, repeats=1, **SIZES)
    assert rows == json.loads((directory / "results.json").read_text())
    return {name: [row for row in rows if row["variant"] == name] for name in NAMES}, directory


def test_rows_are_mixers_at_every_length_with_figures(results):
    rows, directory = results
    for of_variant in rows.values():
        assert [row["seq_len"] for row in of_variant] == list(LENGTHS)
        assert all(value > 0 for row in of_variant for name, value in row.items() if name != "variant")
    text = (directory / "results.md").read_text()
    assert text.count("times the time for 4 times the tokens") == len(NAMES)


def test_a_state_grows_with_the_sequence_for_full_attention_only(results):
    rows, _ = results
    sizes = {name: [row["state_bytes"] for row in of_variant] for name, of_variant in rows.items()}
    keys_and_values = 2 * 16 * 4  # bytes of a position: width 16, float32
    assert sizes["attention"] == [keys_and_values * length for length in LENGTHS]
    assert sizes["window"] == [keys_and_values * SIZES["window"]] * 2
    assert sizes["e2e"] == [keys_and_values * SIZES["window"] + 3 * 16 * 24 * 4] * 2  # and the fast weights


def test_an_unknown_mixer_is_refused(tmp_path):
    with pytest.raises(UserError, match="--mixers=atention: did you mean 'attention'"):
        mixers.run(tmp_path, mixers=("atention",))
