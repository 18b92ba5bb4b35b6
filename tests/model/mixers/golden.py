"""Layers of public implementations in numbers (tests/data/mixers): inputs, outputs, and the parameters by their names.

Made with transformers in float32, with norms and biases away from 1 and 0, so that a wrong convention shows. Matrices
are stored as PyTorch has them, [out, in].
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttt_e2e.config import from_config_dict
from ttt_e2e.model.mixers import Context, make_mixer
from ttt_e2e.model.passes import Pass

DATA = Path(__file__).parents[2] / "data" / "mixers"


def load(name: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(x [2, T, D], y [2, T, D], {name: parameter}) of a layer."""
    with np.load(DATA / f"{name}.npz") as arrays:
        return arrays["x"], arrays["y"], {k[2:]: a for k, a in arrays.items() if k.startswith("p.")}


def make_layer(mixer: str, D: int, fields: dict, parameters: dict):
    """A mixer of width D, with these fields of its section and these parameters."""
    config = from_config_dict({"model": {"hidden_size": D, "num_attention_heads": 2, "mixer": mixer, mixer: fields}})
    layer = make_mixer(mixer, config.model, nnx.Rngs(0))
    expected = {name: p.get_value().shape for name, p in vars(layer).items() if isinstance(p, nnx.Param)}
    assert {name: np.shape(value) for name, value in parameters.items()} == expected
    for name, value in parameters.items():
        getattr(layer, name).set_value(jnp.asarray(value))
    return layer


def run(layer, x_BTD):
    """The layer's outputs [B, T, D] of whole sequences."""
    return jax.jit(jax.vmap(lambda x_TD: layer.whole(x_TD, Pass(), Context())))(x_BTD)
