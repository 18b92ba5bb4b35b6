"""The public operation, and the choice of who computes it.

Shapes: `T` queries, `C` cached keys, `S` keys in view, `N` query heads, `G` key/value heads, `R` = N / G,
`H` head width.
"""

import logging
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from ttt_e2e import targets
from ttt_e2e.errors import UserError
from ttt_e2e.kernels import first_order, primitives, reference

BACKENDS = ("reference", *primitives.BACKENDS, *first_order.BACKENDS)
DERIVATIVES = ("any", "first_order", "reverse_of_tangent")
KERNELS = {"pallas_tpu": "tpu", "mosaic_gpu": "gpu"}  # and the platform they are for


class Faster(NamedTuple):
    """A kernel that was measured to be faster than what `auto` takes otherwise, and where."""

    backend: str
    derivatives: tuple[str, ...]  # that the caller takes
    head_widths: tuple[int, ...]
    min_window: int  # keys that a query sees; full attention sees all


# Kind of device, as `jax.devices()[0].device_kind` names it -> what is faster there; the first that fits is taken.
# Empty, as no kernel has been measured on hardware. An entry is made from the rows of `ttt-e2e bench window_attention`
# on that device: forward and reverse count for "first_order", reverse_of_tangent for the other two.
FASTER: dict[str, tuple[Faster, ...]] = {}

logger = logging.getLogger(__name__)


def window_attention(
    q_TNH,
    k_SGH,
    v_SGH,
    *,
    window: int,
    num_empty=0,
    cached_k=None,
    cached_v=None,
    derivatives: str = "any",
    known: tuple[jax.Array, jax.Array] | None = None,
    with_lse: bool = False,
    backend: str = "auto",
):
    """Causal attention of the last T of S positions to the `window` most recent ones, themselves included.

    Differentiable any number of times, in any nesting of jvp, vjp, vmap, scan, remat, jit and (`check_vma=False`)
    shard_map. Saves for that its inputs, its output, one number a row, and the tangents of these: nothing of size
    T x S. Written for one sequence; batch it with `jax.vmap`, which runs all sequences side by side.

    Args:
      q_TNH: queries; they are the last T of the S positions (S >= T).
      k_SGH: keys; N must be a multiple of G (grouped-query heads). With cached keys: the T new ones, [T, G, H].
      v_SGH: values, likewise.
      window: k, number of positions a query sees; 0 = all before it.
      num_empty: how many leading keys are empty (may be traced); no query sees them.
      cached_k: keys [C, G, H] of the positions before the new ones. Equivalent to leading keys in `k_SGH`, but where
        they are constant no work is spent on their tangents and gradients.
      cached_v: their values.
      derivatives: what the caller takes. "first_order": one derivative at most, which admits the fused kernels of GPUs
        and TPUs. "reverse_of_tangent": a jvp that moves queries, new keys and values, and then its reverse, which takes
        fewer products so. "any" is always right.
      known: the result of an earlier call with these queries, keys and values, `with_lse`; it is not computed again.
      with_lse: whether to return lse too, the log of the softmax's denominator.
      backend: "reference" (dense), "xla" (blocked, everywhere), "pallas_tpu" and "mosaic_gpu" (kernels for TPUs and
        Hopper GPUs), "cudnn" and "splash" (first order only), or "auto": the fastest known.

    Returns:
      Attention output [T, N, H] in the dtype of the values; `with_lse`, (output, lse [T, N]).

    Raises:
      UserError: shapes that do not fit, or a backend that cannot do this.
    """
    cached = (cached_k, cached_v)
    _check_shapes(q_TNH, k_SGH, v_SGH, cached, window)
    _check_one_of("derivatives", derivatives, DERIVATIVES)
    _check_one_of("backend", backend, ("auto", *BACKENDS))
    T, N, _ = q_TNH.shape
    G = k_SGH.shape[1]
    operands = [a for a in (q_TNH, k_SGH, v_SGH, *cached) if a is not None]
    num_cached = k_SGH.shape[0] - T + (0 if cached_k is None else cached_k.shape[0])
    obstacle = first_order.obstacle(q_TNH, num_cached, num_empty, derivatives, known or with_lse)
    if backend == "auto":
        num_keys = num_cached + T
        # With more cached keys than queries, more than half of the fused kernels' work would be wasted.
        fused = not obstacle and num_cached <= T
        backend = _choose(operands, min(window or num_keys, num_keys), derivatives, fused)
    elif backend in first_order.BACKENDS or backend in KERNELS:
        obstacle = obstacle if backend in first_order.BACKENDS else _kernel_obstacle(backend, operands)
        if obstacle:
            raise UserError(f"backend = {backend!r} of window_attention {obstacle}: use auto, xla or reference")
    if backend == "reference" or backend in first_order.BACKENDS:
        k_SGH, v_SGH = (a if c is None else jnp.concatenate([c, a]) for c, a in zip(cached, (k_SGH, v_SGH)))
    if backend in first_order.BACKENDS:
        attend = first_order.BACKENDS[backend]
        return first_order.attend(attend, q_TNH, k_SGH, v_SGH, window=window, num_empty=num_empty)
    if backend == "reference":
        out_TNH, lse_TN = reference.attend(q_TNH, k_SGH, v_SGH, window=window, num_empty=num_empty)
        return (out_TNH, lse_TN) if with_lse else out_TNH
    if cached_k is None:  # an empty cache; its tangent is known to be zero
        cached = (jnp.zeros((0, *a.shape[1:]), a.dtype) for a in (k_SGH, v_SGH))

    def by_head(a_TN):  # [T, N, ...] -> [G, R, T, ...]
        return jnp.moveaxis(a_TN.reshape(T, G, N // G, *a_TN.shape[2:]), 0, 2)

    def by_position(a_GRT):
        return jnp.moveaxis(a_GRT, 2, 0).reshape(T, N, *a_GRT.shape[3:])

    keys = (a.swapaxes(0, 1) for a in (*cached, k_SGH, v_SGH))
    out_GRTH, lse_GRT = primitives.attend(
        by_head(q_TNH),
        *keys,
        jnp.asarray(num_empty, jnp.int32),
        *(map(by_head, known) if known else ()),
        window=window,
        backend=backend,
        fused=derivatives == "reverse_of_tangent",
    )
    return (by_position(out_GRTH), by_position(lse_GRT)) if with_lse else by_position(out_GRTH)


def _choose(operands, num_visible: int, derivatives: str, fused: bool) -> str:
    """What `auto` means; `fused`: whether the fused kernels of others can do it."""
    target = targets.current()
    platform, kind = target.platform, target.kind
    undivided = _is_undivided()
    backend = {"gpu": "cudnn", "tpu": "splash" if undivided else "xla"}.get(platform, "xla") if fused else "xla"
    for faster in FASTER.get(kind, ()) if undivided else ():
        fits = derivatives in faster.derivatives and operands[0].shape[-1] in faster.head_widths
        if fits and num_visible >= faster.min_window and not _kernel_obstacle(faster.backend, operands):
            backend = faster.backend
            break
    _log_choice(platform, backend, derivatives == "first_order" and backend != "xla")
    return backend


def _is_undivided() -> bool:
    """Whether the arrays here lie on one device for certain: XLA cannot divide Pallas kernels among several."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 or (not mesh.empty and set(mesh.axis_types) == {AxisType.Manual})


@lru_cache
def _log_choice(platform: str, backend: str, first_order: bool) -> None:
    """Once for every answer."""
    logger.info("window_attention on %s: backend %s%s", platform, backend, " (first order)" if first_order else "")


def _kernel_obstacle(backend: str, operands) -> str:
    """Why a kernel for accelerators cannot do it; empty where it can."""
    platform = targets.current().platform
    if platform not in (KERNELS[backend], "cpu"):
        return f"is for {KERNELS[backend]}s, not {platform}s"
    try:
        kernels = primitives.passes(backend)
    except ImportError as error:
        return f"cannot be imported here ({error})"
    if platform == "cpu" and not kernels.can_interpret():
        return f"cannot be interpreted by JAX {jax.__version__}, and there is no {KERNELS[backend]}"
    dtypes = {a.dtype for a in operands}
    if len(dtypes) > 1:
        return f"takes arrays of one dtype, not of {' and '.join(sorted(map(str, dtypes)))}"
    return kernels.obstacle(*operands[:3])


def _check_one_of(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise UserError(f"{name} = {value!r} of window_attention: legal are {', '.join(legal)}")


def _check_shapes(q_TNH, k_SGH, v_SGH, cached, window) -> None:
    """Raises a `UserError` where shapes do not fit."""
    (T, N, H), (S, G, _) = q_TNH.shape, k_SGH.shape
    if v_SGH.shape[:2] != (S, G) or k_SGH.shape[2] != H or N % G or S < T or window < 0:
        raise UserError(
            f"window_attention: queries {q_TNH.shape}, keys {k_SGH.shape}, values {v_SGH.shape}, window {window}: "
            "legal are [T, N, H], [S, G, H], [S, G, any] with S >= T, N a multiple of G, and window >= 0"
        )
    if (cached[0] is None) != (cached[1] is None):
        raise UserError("window_attention: give cached_k and cached_v, or neither")
    if cached[0] is not None and (S != T or any(c.shape[1:] != a.shape[1:] for c, a in zip(cached, (k_SGH, v_SGH)))):
        raise UserError(
            f"window_attention: cached keys {cached[0].shape} and values {cached[1].shape} with {T} queries and new "
            f"keys {k_SGH.shape}: legal are [C, G, H] and as many new keys as queries"
        )
