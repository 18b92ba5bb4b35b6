"""Tiny models with random parameters in float64, for tests that claim exactness."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from ttt_e2e.config import Config, from_config_dict
from ttt_e2e.model import Transformer
from ttt_e2e.model.parameters import merge, split

TINY = {
    "vocab_size": 29,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "fast_intermediate_size": 10,
    "compute_dtype": "float64",
    "param_dtype": "float64",
}


@dataclass(frozen=True)
class TinyModel:
    """A model's configuration, its static structure and its weights {"fast": ..., "slow": ...}."""

    config: Config
    graphdef: Any
    params: dict

    def merge(self) -> Transformer:
        """The model with its weights in place."""
        return merge(self.graphdef, self.params["fast"], self.params["slow"])


def tiny_model(*, seed: int = 0, inner=None, train=None, **model) -> TinyModel:
    """A model of the sizes in TINY, but for `model`, with weights large enough that every part of it matters.

    The norms' weights are random too, so that one left out or mistaken for another shows.
    """
    policies = {"trajectory": "store", "remat": "mini_batch"}
    sections = {"model": TINY | model, "inner": policies | (inner or {}), "train": train or {}}
    config = from_config_dict(sections)
    graphdef, fast, slow = split(nnx.eval_shape(lambda: Transformer(config.model, nnx.Rngs(0))))
    random = np.random.default_rng(seed)

    def fill(path, leaf):
        is_norm = path[-1].key == "weight"
        value = random.normal(1.0 if is_norm else 0.0, 0.3 if is_norm else 0.35, leaf.shape)
        return jax.numpy.asarray(value, leaf.dtype)

    return TinyModel(config, graphdef, jax.tree_util.tree_map_with_path(fill, {"fast": fast, "slow": slow}))
