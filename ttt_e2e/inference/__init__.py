"""Reading without end, the state that reading leaves behind, and generation.

This file imports nothing, so that flags are made of `settings.py` without JAX.
"""
