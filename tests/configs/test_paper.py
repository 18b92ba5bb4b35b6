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
from ttt_e2e.model import Transformer

ROOT = Path(__file__).parents[2]
SIZES, KINDS, CONTEXTS = ("125m", "350m", "760m", "1b", "3b"), ("e2e", "swa", "full"), ("8k", "32k", "128k")
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
    config = from_config_dict(load_config(arg))
    model, inner, train, optimizer = config.model, config.inner, config.train, config.optimizer
    assert train.seq_len == {"8k": 8192, "32k": 32768, "128k": 131072}[context]
    assert inner.mini_batch_size == (1024 if kind == "e2e" else train.seq_len)
    assert model.sliding_window == (0 if kind == "full" else 8192)
    theta = {"8k": 5e5, "32k": 2e6, "128k": 1e7}[context] if kind == "full" else 5e5
    assert model.rope_theta == theta
    assert bool(model.num_fast_blocks) == (kind == "e2e")
    assert model.num_fast_blocks in (0, model.num_hidden_layers // 4)
    assert model.fast_intermediate_size == model.intermediate_size
    assert optimizer.warmup_steps == train.num_steps // 10
    assert inner.warmup_steps == (optimizer.warmup_steps if context == "8k" else 0)
    tokens_per_step = 2**20 if size == "3b" else 2**19
    assert train.seq_len * train.global_batch_size == (1 if context == "8k" else 2) * tokens_per_step


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_has_the_stated_number_of_parameters(size, kind):
    config = from_config_dict(load_config(f"{size}-{kind}-8k"))
    model = nnx.eval_shape(lambda: Transformer(config.model, nnx.Rngs(0)))
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    matrices = [p for path, p in jax.tree.leaves_with_path(parameters) if "norm" not in jax.tree_util.keystr(path)]
    count = sum(math.prod(matrix.shape) for matrix in matrices)
    assert round(count / 1e6, 1) == MILLIONS_OF_PARAMETERS[size][kind == "e2e"]


@pytest.mark.parametrize("arg", ["", "125m", "125m-e2e", "2b-e2e-8k", "125m-gru-8k", "125m-e2e-16k", "125m-e2e-8k-x"])
def test_an_unknown_arg_lists_the_legal_ones(arg):
    with pytest.raises(UserError, match=r"\{125m,350m,760m,1b,3b\}-\{e2e,swa,full\}-\{8k,32k,128k\}") as error:
        load_config(arg)
    assert repr(arg) in str(error.value) and "\n" not in str(error.value)
