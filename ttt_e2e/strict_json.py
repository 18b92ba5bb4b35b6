"""Writes JSON that every reader takes: all that the package writes as JSON goes through `to_json`."""

import json
import math


def to_json(value, **options) -> str:
    """Serialises a value as JSON; numbers that are not finite, which JSON lacks, become null.

    options: those of `json.dumps`, such as `indent`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value):
    """A copy of nested dicts and sequences in which numbers that are not finite are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
