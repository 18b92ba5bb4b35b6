"""Window attention: the public operation, its checks, and the call of the backend that computes it.

Shapes: `T` queries, `C` cached keys, `S` keys in view, `N` query heads, `G` key/value heads, `R` = N / G,
`H` head width.
"""

import jax
import jax.numpy as jnp

from ttt_e2e import targets
from ttt_e2e.errors import UserError
from ttt_e2e.kernels.attention import backends, primitives, problems
from ttt_e2e.kernels.attention.backends import REGISTRY
from ttt_e2e.kernels.attention.problems import Problem

DERIVATIVES = ("any", "first_order", "reverse_of_tangent")


def window_attention(  # noqa: PLR0913 -- a call has as many properties
    q_NTH,
    k_GSH,
    v_GSH,
    *,
    window: int,
    num_empty=0,
    cached_k=None,
    cached_v=None,
    derivatives: str = "any",
    recorded: tuple[jax.Array, jax.Array] | None = None,
    with_lse: bool = False,
    backend: str = "auto",
):
    """Causal attention of the last T of S positions to the `window` most recent ones, themselves included.

    Differentiable any number of times, in any nesting of jvp, vjp, vmap, scan, remat, jit and (`check_vma=False`)
    shard_map. Its residuals are its inputs, its output, lse, and the tangents of these: nothing of size T x S.
    Written for one sequence; batch it with `jax.vmap`, which runs all sequences side by side.

    Args:
      q_NTH: queries; they are the last T of the S positions (S >= T).
      k_GSH: keys; N must be a multiple of G (grouped-query heads). With cached keys: the T new ones, [G, T, H].
      v_GSH: values, likewise.
      window: k, number of positions a query sees; 0 = all before it.
      num_empty: how many leading keys are empty (may be traced); no query sees them.
      cached_k: keys [G, C, H] of the positions before the new ones. Equivalent to leading keys in `k_GSH`, but where
        they are constant no work is spent on their tangents and gradients.
      cached_v: their values.
      derivatives: which ones the caller takes. "first_order": one derivative at most, which admits the fused kernels of
        GPUs and TPUs. "reverse_of_tangent": a jvp with tangents of queries, new keys and values, then the vjp of that;
        it takes fewer matrix products if announced. "any" is always right.
      recorded: the result of an earlier call with these queries, keys and values, `with_lse`; not computed again.
      with_lse: whether to return lse too, the log of each query's softmax denominator.
      backend: "reference" (dense), "xla" (blocked, everywhere), "pallas_tpu" and "mosaic_gpu" (kernels for TPUs and
        Hopper GPUs), "cudnn" and "splash" (for callers of "first_order" without lse; others get "auto"), or "auto": the
        fastest on the device, see docs/kernels.md.

    Returns:
      Attention output [N, T, H] in the dtype of the values; `with_lse`, (output, lse [N, T]).

    Raises:
      UserError: shapes that do not fit, or a backend that cannot do this.
    """
    cached = (cached_k, cached_v)
    _check_shapes(q_NTH, k_GSH, v_GSH, cached, window)
    _check_one_of("derivatives", derivatives, DERIVATIVES)
    _check_one_of("backend", backend, ("auto", *REGISTRY))
    asked = {"window": window, "derivatives": derivatives, "with_lse": with_lse, "is_recorded": recorded is not None}
    backend = _resolve(backend, _problem(q_NTH, k_GSH, v_GSH, cached, num_empty, **asked))
    if REGISTRY[backend].form == "passes":
        options = {"window": window, "backend": backend, "fused": derivatives == "reverse_of_tangent"}
        out_NTH, lse = _by_passes(q_NTH, k_GSH, v_GSH, cached, num_empty, recorded, **options)
    else:
        joined = (a if c is None else jnp.concatenate([c, a], axis=1) for c, a in zip(cached, (k_GSH, v_GSH)))
        out_NTH, lse = backends.load(backend).attend(q_NTH, *joined, window=window, num_empty=num_empty)
    return (out_NTH, lse.reshape(q_NTH.shape[:2])) if with_lse else out_NTH


def _by_passes(q_NTH, k_GSH, v_GSH, cached, num_empty, recorded, **params):
    """Output [N, T, H] and lse [G, R, T], by the primitive whose derivatives are a backend's passes."""
    if cached[0] is None:  # an empty cache; JAX knows that its tangent is zero
        cached = (jnp.zeros((a.shape[0], 0, a.shape[2]), a.dtype) for a in (k_GSH, v_GSH))
    (N, T, _), G = q_NTH.shape, k_GSH.shape[0]

    def grouped(a_NT):  # [N, T, ...] -> [G, R, T, ...]
        return a_NT.reshape(G, N // G, *a_NT.shape[1:])

    operands = grouped(q_NTH), *cached, k_GSH, v_GSH, jnp.asarray(num_empty, jnp.int32), *map(grouped, recorded or ())
    out_GRTH, lse_GRT = primitives.forward_p.bind(*operands, **params)
    return out_GRTH.reshape(N, T, -1), lse_GRT


def _problem(q_NTH, k_GSH, v_GSH, cached, num_empty, **asked) -> Problem:
    """The call as a `Problem`; `asked` are fields of it."""
    (N, T, H), (G, S, value_width) = q_NTH.shape, v_GSH.shape
    return Problem(
        kind=targets.current().kind,
        num_queries=T,
        num_cached=S - T + (0 if cached[0] is None else cached[0].shape[1]),
        num_heads=N,
        num_key_heads=G,
        width=H,
        value_width=value_width,
        dtypes=tuple(sorted({str(a.dtype) for a in (q_NTH, k_GSH, v_GSH, *cached) if a is not None})),
        may_be_empty=not isinstance(num_empty, int) or num_empty > 0,
        **asked,
    )


def _resolve(backend: str, problem: Problem) -> str:
    """The backend that computes the call, where `backend` was asked for. Raises a `UserError` where it cannot."""
    if backend == "auto" or not problems.serves(backend, problem):
        return problems.choose(problem)
    if obstacle := problems.obstacle(backend, problem):
        raise UserError(f"backend = {backend!r} of window_attention {obstacle}: use auto, xla or reference")
    return backend


def _check_one_of(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise UserError(f"{name} = {value!r} of window_attention: legal are {', '.join(legal)}")


def _check_shapes(q_NTH, k_GSH, v_GSH, cached, window) -> None:
    """Raises a `UserError` where the arrays' shapes do not fit each other, or the window is negative."""
    (N, T, H), (G, S, _) = q_NTH.shape, k_GSH.shape
    if v_GSH.shape[:2] != (G, S) or k_GSH.shape[2] != H or N % G or S < T or window < 0:
        raise UserError(
            f"window_attention: queries {q_NTH.shape}, keys {k_GSH.shape}, values {v_GSH.shape}, window {window}: "
            "legal are [N, T, H], [G, S, H], [G, S, any] with S >= T, N a multiple of G, and window >= 0"
        )
    if (cached[0] is None) != (cached[1] is None):
        raise UserError("window_attention: give cached_k and cached_v, or neither")
    if cached[0] is not None and (
        S != T
        or any(c.shape[::2] != a.shape[::2] for c, a in zip(cached, (k_GSH, v_GSH)))  # but for the number of positions
    ):
        raise UserError(
            f"window_attention: cached keys {cached[0].shape} and values {cached[1].shape} with {T} queries and new "
            f"keys {k_GSH.shape}: legal are [G, C, H] and as many new keys as queries"
        )
