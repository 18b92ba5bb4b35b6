"""Window attention: one operation, one reference, one file per backend."""

from ttt_e2e.kernels.window_attention import window_attention

__all__ = ["window_attention"]
