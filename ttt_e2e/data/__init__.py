"""Tokenizers, the token store, the embedded corpus, preparation of a store, and the Grain pipeline that reads it.

This file imports nothing, so that a tokenising worker process loads only what it needs.
"""
