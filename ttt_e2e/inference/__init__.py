"""Reading without end, the state that reading leaves behind, and generation."""

from ttt_e2e.inference.reader import Reader, ReaderState

__all__ = ["Reader", "ReaderState"]
