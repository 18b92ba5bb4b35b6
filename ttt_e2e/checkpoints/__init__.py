"""Checkpoints: saved, found, restored, and checked by digests."""
