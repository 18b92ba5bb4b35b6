"""Accelerators, present or not: their facts, compiling programs for them, and reading FLOPs and bytes off these."""

from ttt_e2e.targets.facts import Target, current, of_device

__all__ = ["Target", "current", "of_device"]
