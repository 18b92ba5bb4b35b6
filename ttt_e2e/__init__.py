"""Language models that keep learning while they read (TTT-E2E, arXiv 2512.23675).

From Python (docs/python.md): `load`, `train`, `evaluate`, `load_config` and `UserError`. All but the last are imported
when they are first used, as JAX takes seconds to import.
"""

import importlib

from ttt_e2e.errors import UserError

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "evaluate", "load", "load_config", "train"]


def __getattr__(name: str):
    if name == "train":  # a package that can be called, see there
        return importlib.import_module("ttt_e2e.train")
    if name in __all__:
        return getattr(importlib.import_module("ttt_e2e.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
