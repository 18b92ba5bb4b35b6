"""The quickstart compares three models of equal size on equal terms."""

from pathlib import Path

import jax
import pytest

from ttt_e2e.config import from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.flags import load_config_file
from ttt_e2e.model import abstract_model

PATH = str(Path(__file__).parents[2] / "configs" / "quickstart.py")


def load(arg: str):
    return from_config_dict(load_config_file(f"{PATH}:{arg}"))


def num_matrix_parameters(config) -> int:
    return sum(
        leaf.size for leaf in jax.tree.leaves(abstract_model(config.model)[1]) if leaf.shape[-1] > 1 and leaf.ndim > 1
    )


def test_the_default_learns_while_it_reads():
    assert from_config_dict(load_config_file(PATH)) == load("e2e")
    assert load("e2e").model.num_fast_blocks == 1


def test_equal_parameters_tokens_and_steps():
    e2e, window, full = load("e2e"), load("window"), load("full")
    for other in (window, full):
        # Norms apart: each fast MLP brings two of its own.
        assert abs(num_matrix_parameters(other) / num_matrix_parameters(e2e) - 1) < 0.002
        assert (other.train, other.data, other.optimizer) == (e2e.train, e2e.data, e2e.optimizer)
    assert num_matrix_parameters(window) == num_matrix_parameters(full)


def test_the_window_is_much_shorter_than_the_sequence():
    config = load("window")
    assert config.model.sliding_window * 16 == config.train.seq_len
    assert load("full").model.sliding_window == 0


def test_another_argument_is_refused():
    with pytest.raises(UserError, match="takes e2e, window or full, not 'small'"):
        load("small")
