"""Conversion of checkpoints of other programs."""
