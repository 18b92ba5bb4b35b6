"""Saves, finds and restores checkpoints, and checks them by digests."""
