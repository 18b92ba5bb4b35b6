"""The network, written for one sequence; imports nothing of training."""

from ttt_e2e.model.parameters import FastParam
from ttt_e2e.model.transformer import (
    Suffix,
    Transformer,
    abstract_model,
    abstract_transformer,
    parameter_traits,
    state_bytes,
)

__all__ = [
    "FastParam",
    "Suffix",
    "Transformer",
    "abstract_model",
    "abstract_transformer",
    "parameter_traits",
    "state_bytes",
]
