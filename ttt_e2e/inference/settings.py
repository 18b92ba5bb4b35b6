"""Sampling settings. Imports no JAX, since command-line flags are made from them."""

import math
from dataclasses import dataclass

from ttt_e2e.errors import UserError
from ttt_e2e.settings import setting


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampling of a token. Raises `UserError` for an illegal value."""

    temperature: float = setting("temperature", "0 = always the likeliest token.", 1.0)
    top_k: int = setting("top_k", "Draw from the k likeliest tokens; 0 = off.", 0)
    top_p: float = setting("top_p", "Draw from the fewest with this probability; 1 = off.", 1.0)
    repetition_penalty: float = 1.0  # of logits of tokens that occurred before; 1 = off

    def __post_init__(self):
        _check("temperature", self.temperature, self.temperature >= 0, "a finite number of at least 0 (0 = greedy)")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 = off)")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (1 = off)")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, penalty > 0, "a finite number above 0 (1 = off)")


def _check(name: str, value, legal: bool, text: str) -> None:
    """Raises `UserError` where a value is not legal or not finite; `text` says what is legal."""
    if not (legal and math.isfinite(value)):  # NaN is not legal either: it compares as false
        raise UserError(f"{name} is {value}, but it must be {text}")
