"""The outer loop: AdamW over sequences, on a mesh, with checkpoints and metrics."""
