"""Measuring models: losses on held-out text, and reports."""
