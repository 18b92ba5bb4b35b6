"""What a kernel says of itself in a program's text, where its compiler leaves no word of what it computes."""

import re

import jax

_MARK = re.compile(r"\b([\w.]+)_of_(\d+)_flops\b")


def kernel(name: str, flops: int):
    """A scope for one kernel: its name, and the FLOPs of its matrix products."""
    return jax.named_scope(f"{name}_of_{flops}_flops")


def read(op_name: str) -> tuple[str, int] | None:
    """(Name, FLOPs) that an operation's metadata says; None where it says nothing."""
    found = _MARK.search(op_name)
    return (found[1], int(found[2])) if found else None
