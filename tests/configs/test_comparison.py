"""The compared models: equal parameters to 2 %, on equal terms."""

from pathlib import Path

import jax
import pytest

from ttt_e2e.config import from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.flags import load_config_file
from ttt_e2e.model import abstract_model

PATH = str(Path(__file__).parents[2] / "configs" / "comparison.py")
KINDS = ("e2e", "e2e_hybrid", "full", "swa", "hybrid", "mamba2", "gdn", "kvb")


def load(arg: str):
    return from_config_dict(load_config_file(f"{PATH}:{arg}"))


def num_parameters(arg: str) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(load(arg).model)[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_parameters_and_terms(kind):
    full, config = load("full"), load(kind)
    assert abs(num_parameters(kind) / num_parameters("full") - 1) < 0.02
    assert (config.train, config.data, config.optimizer) == (full.train, full.data, full.optimizer)
    assert bool(config.model.num_fast_blocks) == kind.startswith("e2e")
    mixers = set(config.model.mixers)
    assert {"mamba2": "mamba2", "gdn": "gated_deltanet", "kvb": "ttt_kvb"}.get(kind) in {None, *mixers}
    assert ("attention" in mixers) == (kind in ("full", "hybrid", "e2e_hybrid"))
    assert ("window" in mixers) == (kind != "full")


def test_the_sweep_has_them_all():
    import importlib.util

    spec = importlib.util.spec_from_file_location("comparison", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.sweep() == {"arg": list(KINDS)}
    with pytest.raises(UserError, match="has no 'gru': it takes e2e, e2e_hybrid"):
        module.get_config("gru")
