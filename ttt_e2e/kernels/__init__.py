"""Hand-written array programs: window attention, as one operation that several backends compute."""

from ttt_e2e.kernels.attention.window_attention import window_attention

__all__ = ["window_attention"]
