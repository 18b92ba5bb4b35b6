"""Evaluations of checkpoints on held-out text, and reports on runs."""
