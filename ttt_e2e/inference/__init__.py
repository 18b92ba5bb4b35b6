"""Reading text of any length (prefill), saving and restoring a reader's state, and generation (decoding).

This file imports nothing, so that command-line flags can be made from `settings.py` without importing JAX.
"""
