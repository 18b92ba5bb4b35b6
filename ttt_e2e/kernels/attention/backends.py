"""The backends of window attention, a line each.

A new one is a module, a line in `REGISTRY` and its name in `config.ATTENTION_BACKENDS`.
"""

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple


class Backend(NamedTuple):
    """One way to compute window attention, and where.

    What the module has to define depends on the form:
      "passes": `forward`, `tangent`, `dual`, `reverse` and `second_reverse` with the arguments and shapes of xla.py,
        from which primitives.py makes every derivative.
      "dense": `attend` of whole arrays, as in reference.py, which JAX differentiates.
      "fused": the same, differentiable once and without lse, as in cudnn.py; and `attend_square`, for as many queries
        as keys.
    Where it is for one platform, also `obstacle(problem)`: why it cannot compute a `Problem`, "" where it can; if its
    form is "passes", `can_interpret()`: whether this JAX runs it on CPUs, for tests.
    """

    module: str  # in this package
    platform: str = ""  # that it is for; "" = runs everywhere
    form: str = "passes"
    divisible: bool = False  # whether XLA divides its arrays among devices, as it cannot those of Pallas kernels


REGISTRY = {
    "reference": Backend("reference", form="dense", divisible=True),
    "xla": Backend("xla", divisible=True),
    "pallas_tpu": Backend("tpu.passes", "tpu"),
    "mosaic_gpu": Backend("hopper.passes", "gpu"),
    "cudnn": Backend("cudnn", "gpu", form="fused", divisible=True),
    "splash": Backend("splash", "tpu", form="fused"),
}


def names(form: str, *platforms: str) -> tuple[str, ...]:
    """Backends of a form, in the order of the registry; with platforms, only those for one of these."""
    return tuple(n for n, b in REGISTRY.items() if b.form == form and (not platforms or b.platform in platforms))


@lru_cache
def load(name: str) -> ModuleType:
    """A backend's module; imported when first wanted, as those for accelerators are slow to import or not installed.

    Raises:
      ImportError: it needs a part of JAX that is not installed here.
    """
    return import_module(f"{__package__}.{REGISTRY[name].module}")
