"""What the network computes; knows nothing of training."""

from ttt_e2e.model.parameters import FastParam
from ttt_e2e.model.transformer import KeyValues, Suffix, Transformer, abstract_model

__all__ = ["FastParam", "KeyValues", "Suffix", "Transformer", "abstract_model"]
