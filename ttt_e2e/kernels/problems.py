"""What a call of window attention asks for, which backends can do it, and which of them `auto` takes.

Shapes: `T` queries, `K` keys before them, `N` query heads, `G` key/value heads, `H` head width.
"""

import contextlib
import logging
from functools import lru_cache
from typing import NamedTuple

import jax
from jax.sharding import AxisType

from ttt_e2e import targets
from ttt_e2e.kernels import first_order, primitives

BACKENDS = ("reference", *primitives.BACKENDS, *first_order.BACKENDS)
PLATFORMS = {"mosaic_gpu": "gpu", "cudnn": "gpu", "pallas_tpu": "tpu", "splash": "tpu"}  # others run everywhere
# What is expected to be fastest on accelerators that are not at hand, where nothing can be timed; else "xla".
EXPECTED = {
    ("gpu", "first_order"): ("cudnn", "mosaic_gpu"),
    ("gpu", "any"): ("mosaic_gpu",),
    ("gpu", "reverse_of_tangent"): ("mosaic_gpu",),
    ("tpu", "first_order"): ("splash", "pallas_tpu"),
    ("tpu", "any"): ("pallas_tpu",),
    ("tpu", "reverse_of_tangent"): ("pallas_tpu",),
}

logger = logging.getLogger(__name__)


class Problem(NamedTuple):
    """A call: shapes of one sequence, and what becomes of the result."""

    kind: str  # of device, as JAX names it
    num_queries: int
    num_cached: int
    num_heads: int
    num_key_heads: int
    width: int  # of queries and keys
    value_width: int
    dtypes: tuple[str, ...]  # all that there are
    window: int
    may_be_empty: bool  # whether leading keys are, or may be: `num_empty`
    derivatives: str
    with_lse: bool
    is_known: bool

    def arrays(self) -> list[jax.ShapeDtypeStruct]:
        """Queries [N, T, H], new keys and values [G, T, H]."""
        T, G, dtype = self.num_queries, self.num_key_heads, self.dtypes[0]
        shapes = ((self.num_heads, T, self.width), (G, T, self.width), (G, T, self.value_width))
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

    def __str__(self):
        """As in the log."""
        T, K, N, G, H = self[1:6]
        shape = f"{T} queries, {K} cached keys, window {self.window}, {N} heads ({G} of keys) of {H}"
        lse = ", output known" if self.is_known else ", with lse" if self.with_lse else ""
        return f"{shape}, {'/'.join(self.dtypes)}, {self.derivatives}{lse}"


# What was measured in this process, or said to it: `choice.measure`.
measured: dict[Problem, str] = {}
_noted: list[dict] = []  # of those who listen


@contextlib.contextmanager
def noting():
    """Inside, the problems that `auto` is asked for are noted: the keys of the dict, in order."""
    _noted.append({})
    try:
        yield _noted[-1]
    finally:
        _noted.pop()


def choose(problem: Problem) -> str:
    """What `auto` means."""
    backends = candidates(problem)
    for noted in _noted:
        noted[problem] = backends
    backend = measured.get(problem) or next(filter(backends.__contains__, _expected(problem)), "xla")
    _log_choice(problem.kind, backend, problem.derivatives)
    return backend


def candidates(problem: Problem) -> tuple[str, ...]:
    """The backends that can do it, "xla" first. Those that XLA cannot divide, only where nothing is divided."""
    alone = is_on_one_device()
    names = [name for name, platform in PLATFORMS.items() if platform == targets.current().platform]
    able = [name for name in names if serves(name, problem) and not obstacle(name, problem)]
    return "xla", *(name for name in able if alone or name == "cudnn")


def _expected(problem: Problem) -> tuple[str, ...]:
    """In order of preference. At hand, no kernel of ours is taken before it has been checked."""
    order = EXPECTED.get((targets.current().platform, problem.derivatives), ())
    if problem.num_cached > problem.num_queries:  # more than half of the fused kernels' work would be wasted
        order = tuple(name for name in order if name not in first_order.BACKENDS)
    if is_at_hand(problem.kind):
        order = tuple(name for name in order if name in first_order.BACKENDS)
    return order


def is_at_hand(kind: str) -> bool:
    """Whether there is such a device here."""
    return kind == jax.devices()[0].device_kind


def is_on_one_device() -> bool:
    """Whether the arrays here lie on one device for certain: XLA cannot divide Pallas kernels among several."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 if mesh.empty else mesh.size == 1 or set(mesh.axis_types) == {AxisType.Manual}


def serves(backend: str, problem: Problem) -> bool:
    """Whether it is for such callers."""
    return backend not in first_order.BACKENDS or first_order.serves(problem)


def obstacle(backend: str, problem: Problem) -> str:
    """Why it cannot take these arrays here; empty where it can."""
    platform, its_own = targets.current().platform, PLATFORMS.get(backend)
    if its_own is None:
        return ""
    if platform != its_own and (platform != "cpu" or backend in first_order.BACKENDS):
        return f"is for {its_own}s, not {platform}s"
    if len(problem.dtypes) > 1:
        return f"takes arrays of one dtype, not of {' and '.join(problem.dtypes)}"
    if backend in first_order.BACKENDS:
        return first_order.obstacle(problem)
    try:
        kernels = primitives.passes(backend)
    except ImportError as error:
        return f"cannot be imported here ({error})"
    if platform == "cpu" and not kernels.can_interpret():
        return f"cannot be interpreted by JAX {jax.__version__}, and there is no {its_own}"
    return kernels.obstacle(*problem.arrays())


@lru_cache
def _log_choice(kind: str, backend: str, derivatives: str) -> None:
    """Once for every answer."""
    logger.info("window_attention on %s: backend %s (derivatives: %s)", kind, backend, derivatives)
