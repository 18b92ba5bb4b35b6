"""The inner loop: SGD on the fast weights while a sequence is read, and the meta-gradient through it."""

from ttt_e2e.inner.loop import Reading, read_batch, read_sequence
from ttt_e2e.inner.step import clip_scale, inner_learning_rate

__all__ = ["Reading", "clip_scale", "inner_learning_rate", "read_batch", "read_sequence"]
