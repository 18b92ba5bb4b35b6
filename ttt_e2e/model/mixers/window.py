"""Attention of each position to the `config.model.sliding_window` most recent ones, itself included."""

from ttt_e2e.model.mixers.attention import Attention
from ttt_e2e.model.mixers.base import register

register("window", lambda config, rngs: Attention(config, rngs, window=config.sliding_window))
