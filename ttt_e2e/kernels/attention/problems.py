"""What a call of window attention asks for, which backends can compute it, and which of them `auto` takes.

Shapes: `T` queries, `K` keys before them, `N` query heads, `G` key/value heads, `H` head width.
"""

import contextlib
import logging
from functools import lru_cache
from typing import NamedTuple

import jax
from jax.sharding import AxisType

from ttt_e2e import targets
from ttt_e2e.kernels.attention import backends
from ttt_e2e.kernels.attention.backends import REGISTRY

logger = logging.getLogger(__name__)


class Problem(NamedTuple):
    """One call: the shapes of its sequence, and what its caller does with the result."""

    kind: str  # of device, as JAX names it
    num_queries: int
    num_cached: int
    num_heads: int
    num_key_heads: int
    width: int  # of queries and keys
    value_width: int
    dtypes: tuple[str, ...]  # that occur among the arrays
    window: int
    may_be_empty: bool  # whether leading keys are, or may be: `num_empty`
    derivatives: str
    with_lse: bool
    is_recorded: bool  # whether the result of an earlier call is given

    def __str__(self):
        """As in the log."""
        T, K, N, G, H = self[1:6]
        shape = f"{T} queries, {K} cached keys, window {self.window}, {N} heads ({G} of keys) of {H}"
        lse = ", output recorded" if self.is_recorded else ", with lse" if self.with_lse else ""
        return f"{shape}, {'/'.join(self.dtypes)}, {self.derivatives}{lse}"


# The backend that `choice.measure` decided on, for each problem that it measured in this process.
measured: dict[Problem, str] = {}
_noted: list[dict] = []  # one dict for each `noting` that is open


@contextlib.contextmanager
def noting():
    """Inside, each problem that `auto` is asked for becomes a key of the dict, with its candidates, in order."""
    _noted.append({})
    try:
        yield _noted[-1]
    finally:
        _noted.pop()


def choose(problem: Problem) -> str:
    """The backend that `auto` stands for: the measured one, else the one that is expected to be fastest."""
    able = candidates(problem)
    for noted in _noted:
        noted[problem] = able
    backend = measured.get(problem) or _expected(problem, able)
    _log_choice(problem.kind, backend, problem.derivatives)
    return backend


def candidates(problem: Problem) -> tuple[str, ...]:
    """The backends that can compute it, "xla" first. Those that XLA cannot divide, only where nothing is divided."""
    alone = is_on_one_device()
    names = [name for name, backend in REGISTRY.items() if backend.platform == targets.current().platform]
    able = [name for name in names if serves(name, problem) and not obstacle(name, problem)]
    return "xla", *(name for name in able if alone or REGISTRY[name].divisible)


def _expected(problem: Problem, able: tuple[str, ...]) -> str:
    """The one of these backends to take where nothing was measured: fused kernels, then our own, then XLA.

    Our own kernels only for devices that are not at hand: on one that is, they have to be checked first.
    """
    xla, *kernels = able
    fused = [name for name in kernels if REGISTRY[name].form == "fused"]
    if problem.num_cached > problem.num_queries:  # more than half of their work would be wasted
        fused = []
    own = [] if is_at_hand(problem.kind) else [name for name in kernels if REGISTRY[name].form == "passes"]
    return (*fused, *own, xla)[0]


def is_at_hand(kind: str) -> bool:
    """Whether this process has such a device."""
    return kind == jax.devices()[0].device_kind


def is_on_one_device() -> bool:
    """Whether the arrays here lie on one device for certain: XLA cannot divide Pallas kernels among several."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 if mesh.empty else mesh.size == 1 or set(mesh.axis_types) == {AxisType.Manual}


def serves(backend: str, problem: Problem) -> bool:
    """Whether a backend gives such callers what they ask for.

    Fused kernels are for callers that differentiate once, have no use for lse, and have no empty keys but cached ones.
    """
    if REGISTRY[backend].form != "fused":
        return True
    needs_lse = problem.with_lse or problem.is_recorded
    has_place = problem.num_cached > 0 or not problem.may_be_empty
    return problem.derivatives == "first_order" and not needs_lse and has_place


def obstacle(name: str, problem: Problem) -> str:
    """Why a backend cannot compute the problem here; empty where it can."""
    platform, backend = targets.current().platform, REGISTRY[name]
    if not backend.platform:
        return ""
    if platform != backend.platform and (platform != "cpu" or backend.form == "fused"):
        return f"is for {backend.platform}s, not {platform}s"
    if len(problem.dtypes) > 1:
        return f"takes arrays of one dtype, not of {' and '.join(problem.dtypes)}"
    try:
        module = backends.load(name)
    except ImportError as error:
        return f"cannot be imported here ({error})"
    if platform == "cpu" and not module.can_interpret():
        return f"cannot be interpreted by JAX {jax.__version__}, and there is no {backend.platform}"
    return module.obstacle(problem)


@lru_cache
def _log_choice(kind: str, backend: str, derivatives: str) -> None:
    """Logs each choice once."""
    logger.info("window_attention on %s: backend %s (derivatives: %s)", kind, backend, derivatives)
