"""Accelerators, at hand or not: their facts, programs compiled for them, and what these say."""

from ttt_e2e.targets.facts import Target, current, of_device

__all__ = ["Target", "current", "of_device"]
