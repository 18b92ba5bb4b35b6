"""Hand-written array programs: window attention, which several backends compute, and recurrences by chunks."""

from ttt_e2e.kernels.attention.window_attention import window_attention

__all__ = ["window_attention"]
