"""Documents, tokenizers, the token store, its preparation from a corpus, and the Grain pipeline that reads it.

This file imports nothing, so that a worker process that tokenizes loads only what it needs.
"""
