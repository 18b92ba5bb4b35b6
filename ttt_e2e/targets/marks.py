"""A kernel's name and FLOPs, written into its program's metadata, for kernels whose cost the compiled text omits."""

import re

import jax

_MARK = re.compile(r"\b([\w.]+)_of_(\d+)_flops\b")


def kernel(name: str, flops: int):
    """A `jax.named_scope` that records one kernel's name and the FLOPs of its matrix products."""
    return jax.named_scope(f"{name}_of_{flops}_flops")


def read(op_name: str) -> tuple[str, int] | None:
    """(Name, FLOPs) that `kernel` recorded in an operation's name; None where there is no record."""
    mark = _MARK.search(op_name)
    return (mark[1], int(mark[2])) if mark else None
