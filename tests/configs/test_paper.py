"""Every configuration of the paper: legal, and of the stated size."""

import importlib.util
import itertools
import math
from pathlib import Path

import jax
import pytest
from flax import nnx

from ttt_e2e.config import from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.model import Transformer, abstract_model, abstract_transformer

ROOT = Path(__file__).parents[2]
SIZES, CONTEXTS = ("125m", "350m", "760m", "1b", "3b"), ("8k", "32k", "128k")
KINDS = ("e2e", "e2e_hybrid", "full", "swa", "hybrid", "mamba2", "gdn", "kvb")
ARGS = ["-".join(parts) for parts in itertools.product(SIZES, KINDS, CONTEXTS)]
MILLIONS_OF_PARAMETERS = {  # full (and swa) / e2e, as stated: matrices only, norm weights (0.01 to 0.04 %) not counted
    "125m": (183.4, 184.3),
    "350m": (439.6, 444.3),
    "760m": (876.5, 883.6),
    "1b": (1458.0, 1467.5),
    "3b": (2865.9, 2897.3),
}


def load_config(arg):
    spec = importlib.util.spec_from_file_location("paper", ROOT / "configs" / "paper.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize("arg", ARGS)
def test_is_legal_and_keeps_the_papers_rules(arg):
    size, kind, context = arg.split("-")
    learns = kind.startswith("e2e")
    config = from_config_dict(load_config(arg))
    model, inner, train, optimizer = config.model, config.inner, config.train, config.optimizer
    assert train.seq_len == {"8k": 8192, "32k": 32768, "128k": 131072}[context]
    assert inner.mini_batch_size == (1024 if learns else train.seq_len)
    assert model.sliding_window == (0 if kind == "full" else 8192)
    theta = {"8k": 5e5, "32k": 2e6, "128k": 1e7}[context] if kind in ("full", "hybrid", "e2e_hybrid") else 5e5
    assert model.rope_theta == theta
    assert bool(model.num_fast_blocks) == learns
    assert model.num_fast_blocks in (0, model.num_hidden_layers // 4)
    assert model.fast_intermediate_size == model.intermediate_size
    kinds = model.mixers * (model.num_hidden_layers // len(model.mixers))
    assert kinds.count("attention") == {"full": len(kinds), "hybrid": len(kinds) // 6}.get(
        kind, model.num_prefix_blocks // 6 if kind == "e2e_hybrid" else 0
    )
    assert set(kinds[model.num_prefix_blocks :]) <= {"window"}
    recurrent = {"mamba2": "mamba2", "gdn": "gated_deltanet", "kvb": "ttt_kvb"}.get(kind)
    assert kinds.count(recurrent) == (len(kinds) // 2 if recurrent else 0)
    if kind == "gdn":
        made = abstract_transformer(model).prefix_0.mixer
        assert made.num_heads * made.key_width * 4 == 3 * model.hidden_size
    assert optimizer.warmup_steps == train.num_steps // 10
    assert inner.warmup_steps == (optimizer.warmup_steps if context == "8k" else 0)
    tokens_per_step = 2**20 if size == "3b" else 2**19
    assert train.seq_len * train.global_batch_size == (1 if context == "8k" else 2) * tokens_per_step


def num_parameters(arg: str) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(from_config_dict(load_config(arg)).model)[1]))


@pytest.mark.parametrize("size", SIZES)
def test_all_kinds_have_about_as_many_parameters(size):
    """As the table of docs/mixers.md says, in millions."""
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs" / "mixers.md").read_text().splitlines() if "|" in line]
    [header] = [[cell.strip() for cell in row] for row in rows if row[0].strip() == "size"]
    [stated] = [[cell.strip() for cell in row] for row in rows if row[0].strip() == size]
    counts = {kind: num_parameters(f"{size}-{kind}-8k") for kind in KINDS}
    assert dict(zip(header, stated)) == {"size": size} | {kind: f"{count / 1e6:.1f}" for kind, count in counts.items()}
    assert all(abs(count / counts["full"] - 1) < 0.02 for count in counts.values()), counts


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ("e2e", "swa", "full"))
def test_has_the_stated_number_of_parameters(size, kind):
    config = from_config_dict(load_config(f"{size}-{kind}-8k"))
    model = nnx.eval_shape(lambda: Transformer(config.model, nnx.Rngs(0)))
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    matrices = [p for path, p in jax.tree.leaves_with_path(parameters) if "norm" not in jax.tree_util.keystr(path)]
    count = sum(math.prod(matrix.shape) for matrix in matrices)
    assert round(count / 1e6, 1) == MILLIONS_OF_PARAMETERS[size][kind == "e2e"]


@pytest.mark.parametrize("arg", ["", "125m", "125m-e2e", "2b-e2e-8k", "125m-gru-8k", "125m-e2e-16k", "125m-e2e-8k-x"])
def test_an_unknown_arg_lists_the_legal_ones(arg):
    with pytest.raises(
        UserError, match=r"\{125m,350m,760m,1b,3b\}-\{e2e,e2e_hybrid,full,.*,kvb\}-\{8k,32k,128k\}"
    ) as error:
        load_config(arg)
    assert repr(arg) in str(error.value) and "\n" not in str(error.value)
