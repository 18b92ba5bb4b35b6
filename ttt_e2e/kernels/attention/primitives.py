"""Window attention as JAX primitives, with rules for jvp, transposition and vmap.

JAX's custom_jvp and custom_vjp allow some nestings and break in others; primitives with rules of their own allow all.
The family is closed. In the notation of docs/kernels.md, with x = (q, k, v) and directions y, z of x:

    forward         (o, lse)(x)
    tangent         D(o, lse) y                                   linear in y           transposes to reverse
    reverse         D(o, lse)^T bars                              linear in bars        transposes to tangent
    hessian         derivative of reverse along (y, bars_dot)     linear in these       transposes to itself
    second_tangent  derivative of tangent along (z, z_dot)        linear in these       transposes to second_reverse
    second_reverse  what that transposes to                       linear in bars        transposes to second_tangent

`forward` of a caller who takes jvp first and reverse second (`fused`) has its derivatives in fewer products:

    dual            (o, lse, D(o, lse) y)(x)                      its jvp is dual_tangent
    dual_tangent    derivative of dual along (z, z_dot)           linear in these       transposes to second_reverse

Residuals are only x, (o, lse) and tangents of these. Third derivatives of attention, those of hessian, second_tangent,
second_reverse and dual_tangent, come from autodiff of these passes, and may save more.

The passes themselves are a backend's, and arrays have the shapes of xla.py. The operands of all but `forward` and
`dual` begin with a point: q, k, v, num_empty, o, lse. `forward` takes keys and values in two parts, cached (of length 0
if none) and new: where the cached ones are constant, tangents and gradients are computed for the new ones alone. Those
two may end with (o, lse) recorded by an earlier pass, which they then return.
Parameters: `backend`, the name of whose passes compute it; `num_keys`, how many of the last keys need gradients;
`fused`, see above.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ttt_e2e.kernels.attention import tiles, xla
from ttt_e2e.kernels.attention.backends import load
from ttt_e2e.kernels.precision import matmul_precision

POINT = 6  # operands q, k, v, num_empty, o, lse: where a derivative is taken


# ---- the passes


def _forward(q, k_cached, v_cached, k, v, num_empty, *recorded, window, backend, fused):
    if recorded:
        return recorded
    return load(backend).forward(q, _join(k_cached, k), _join(v_cached, v), num_empty, window=window)


def _dual(q, k, v, num_empty, *operands, window, backend):
    """(operands: point without (o, lse), y, recorded) -> (o, lse, their tangents)."""
    y, recorded = _split(operands, 3)
    if recorded:
        return *recorded, *_tangent(q, k, v, num_empty, *recorded, *y, window=window, backend=backend)
    return load(backend).dual(q, k, v, num_empty, *y, window=window)


def _tangent(*operands, window, backend):
    return load(backend).tangent(*operands, window=window)


def _reverse(*operands, window, backend, num_keys):
    return load(backend).reverse(*operands, window=window, num_keys=num_keys)


def _hessian(*operands, window, backend, num_keys):
    """(operands: point, bars, y, bars_dot) -> tangents of `reverse`, tangents of (o, lse)."""
    point, bars, y, bars_dot = _split(operands, POINT, 2, 3)
    out_dot = _tangent(*point, *y, window=window, backend=backend)
    second_reverse = load(backend).second_reverse
    x_bar = second_reverse(*point, *y, *out_dot, *bars, *bars_dot, window=window, num_keys=num_keys)[:3]
    return *x_bar, *out_dot


def _second_reverse(*operands, window, backend, num_keys):
    """(operands: point, y, tangents of (o, lse), their cotangents) -> cotangents of x, y."""
    return load(backend).second_reverse(*operands, window=window, num_keys=num_keys)


def _dual_tangent(*operands, window, backend):
    """(operands: as of `_second_tangent`) -> tangents of `dual` as x moves by z and y by z_dot."""
    point, y_and_out_dot, z, z_dot = _split(operands, POINT, 5, 3)
    params = {"window": window, "backend": backend}
    out_dot = _tangent(*point, *z, **params)
    return *out_dot, *_second_tangent(*point, *y_and_out_dot, *z, *z_dot, **params)


def _second_tangent(*operands, window, backend):
    """(operands: point, y, tangents of (o, lse), z, z_dot) -> tangents of `tangent` as x moves by z and y by z_dot."""
    (q, k, v, num_empty, *_), y, _, z, z_dot = _split(operands, POINT, 3, 2, 3)
    k_dot, v_dot = (jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(k.shape[-2] - a.shape[-2], 0), (0, 0)]) for a in z[1:])

    def tangent_at(q, k, v, *y):
        out = xla.forward(q, k, v, num_empty, window=window)
        return xla.tangent(q, k, v, num_empty, *out, *y, window=window)

    return jax.jvp(tangent_at, (q, k, v, *y), (z[0], k_dot, v_dot, *z_dot))[1]


# ---- shapes


def _out_avals(q, v):
    return q.update(shape=(*q.shape[:-1], v.shape[-1]), dtype=v.dtype), q.update(
        shape=q.shape[:-1], dtype=tiles.wide(q.dtype)
    )


def _x_avals(q, k, v, num_keys):
    return [q, *(a.update(shape=(*a.shape[:-2], num_keys, a.shape[-1])) for a in (k, v))]


def _forward_avals(q, k_cached, v_cached, k, v, *_, **__):
    return _out_avals(q, v)


def _dual_avals(q, k, v, *_, **__):
    return _out_avals(q, v) * 2


def _tangent_avals(q, k, v, *_, **__):
    return _out_avals(q, v)


def _reverse_avals(q, k, v, *_, num_keys, **__):
    return _x_avals(q, k, v, num_keys)


def _hessian_avals(q, k, v, *_, num_keys, **__):
    return [*_x_avals(q, k, v, num_keys), *_out_avals(q, v)]


def _second_reverse_avals(q, k, v, *operands, num_keys, **__):
    return [*_x_avals(q, k, v, num_keys), *_x_avals(q, k, v, operands[4].shape[-2])]


# ---- derivatives. (In a rule of transposition, the operands to transpose by are UndefinedPrimal; `ct`, the cotangents
# of the results, may be Zero.)


def _forward_jvp(primals, tangents, *, fused, **params):
    q, k_cached, v_cached, k_new, v_new, num_empty, *recorded = primals
    q_dot, k_cached_dot, v_cached_dot, k_dot, v_dot, *_ = tangents
    k, v = _join(k_cached, k_new), _join(v_cached, v_new)
    k_dot, v_dot = ad.instantiate_zeros(k_dot), ad.instantiate_zeros(v_dot)
    if _any(k_cached_dot, v_cached_dot):
        k_dot = _join(ad.instantiate_zeros(k_cached_dot), k_dot)
        v_dot = _join(ad.instantiate_zeros(v_cached_dot), v_dot)
    y = (ad.instantiate_zeros(q_dot), k_dot, v_dot)
    if fused:
        out = dual_p.bind(q, k, v, num_empty, *y, *recorded, **params)
        return out[:2], out[2:]
    out = forward_p.bind(*primals, fused=fused, **params)
    return out, tangent_p.bind(q, k, v, num_empty, *out, *y, **params)


def _dual_jvp(primals, tangents, **params):
    x, num_empty, y, _ = _split(primals, 3, 1, 3)
    z, _, z_dot, _ = _split(map(ad.instantiate_zeros, tangents), 3, 1, 3)
    o, lse, *out_dot = out = dual_p.bind(*primals, **params)
    return out, dual_tangent_p.bind(*x, *num_empty, o, lse, *y, *out_dot, *z, *z_dot, **params)


def _tangent_jvp(primals, tangents, **params):
    out = tangent_p.bind(*primals, **params)
    x_dot, y_dot = tangents[:3], map(ad.instantiate_zeros, tangents[POINT:])
    if _any(*x_dot):
        return out, second_tangent_p.bind(*primals, *out, *map(ad.instantiate_zeros, x_dot), *y_dot, **params)
    return out, tangent_p.bind(*primals[:POINT], *y_dot, **params)


def _reverse_jvp(primals, tangents, **params):
    out = reverse_p.bind(*primals, **params)
    x_dot, bars_dot = tangents[:3], tangents[POINT:]
    bars_dot = list(map(ad.instantiate_zeros, bars_dot)) if _any(*bars_dot) else []
    if _any(*x_dot):
        return out, hessian_p.bind(*primals, *map(ad.instantiate_zeros, x_dot), *bars_dot, **params)[:3]
    return out, reverse_p.bind(*primals[:POINT], *bars_dot, **params)


def _tangent_transpose(ct, *operands, **params):
    point, y = _split(operands, POINT)
    bars = map(ad.instantiate_zeros, ct)
    return [None] * POINT + reverse_p.bind(*point, *bars, num_keys=_num_keys(y), **params)


def _reverse_transpose(ct, *operands, num_keys, **params):
    return [None] * POINT + tangent_p.bind(*operands[:POINT], *map(ad.instantiate_zeros, ct), **params)


def _hessian_transpose(ct, *operands, num_keys, **params):
    fixed, y, bars_dot = _split(operands, POINT + 2, 3)
    out_bars = list(map(ad.instantiate_zeros, ct[3:])) if _any(*ct[3:]) else []
    out = hessian_p.bind(*fixed, *map(ad.instantiate_zeros, ct[:3]), *out_bars, num_keys=_num_keys(y), **params)
    return [None] * len(fixed) + out[: 3 + len(bars_dot)]


def _dual_tangent_transpose(ct, *operands, **params):
    fixed, z, _ = _split(operands, POINT + 5, 3)
    o_bar, lse_bar, o_dot_bar, lse_dot_bar = map(ad.instantiate_zeros, ct)
    bars = (o_dot_bar, lse_dot_bar, o_bar, lse_bar)
    return [None] * len(fixed) + second_reverse_p.bind(*fixed, *bars, num_keys=_num_keys(z), **params)


def _second_tangent_transpose(ct, *operands, **params):
    fixed, z, _ = _split(operands, POINT + 5, 3)
    bars = map(ad.instantiate_zeros, ct)
    return [None] * len(fixed) + second_reverse_p.bind(*fixed, *bars, num_keys=_num_keys(z), **params)


def _second_reverse_transpose(ct, *operands, num_keys, **params):
    fixed, bars = _split(operands, POINT + 5)
    ct = map(ad.instantiate_zeros, ct)
    if len(bars) == 2:
        return [None] * len(fixed) + second_tangent_p.bind(*fixed, *ct, **params)
    o_bar, lse_bar, o_dot_bar, lse_dot_bar = dual_tangent_p.bind(*fixed, *ct, **params)
    return [None] * len(fixed) + [o_dot_bar, lse_dot_bar, o_bar, lse_bar]


def _any(*tangents):
    return any(type(t) is not ad.Zero for t in tangents)


def _num_keys(direction):
    """How many keys a direction (q, k, v) moves, where it is an operand that a program is linear in."""
    return direction[1].aval.shape[-2]


# ---- helpers, and the primitives


def _join(cached, new):
    return jnp.concatenate([cached, new], axis=-2) if cached.shape[-2] else new


def _split(operands, *sizes):
    groups, rest = [], list(operands)
    for size in sizes:
        groups.append(rest[:size])
        rest = rest[size:]
    return *groups, rest


def _high_jvp(primitive, implementation, linear_from, primals, tangents, **params):
    """JVP of a primitive that is linear in its operands from number `linear_from` on.

    Where the other operands have no tangents, the primitive itself, of the tangents; else autodiff of its
    implementation by the backend "xla".
    """
    if not _any(*tangents[:linear_from]):
        linear = map(ad.instantiate_zeros, tangents[linear_from:])
        return primitive.bind(*primals, **params), primitive.bind(*primals[:linear_from], *linear, **params)
    moving = [i for i, t in enumerate(tangents) if _any(t)]

    def moved(*values):
        operands = dict(enumerate(primals)) | dict(zip(moving, values))
        return list(implementation(*operands.values(), **params | {"backend": "xla"}))

    return jax.jvp(moved, [primals[i] for i in moving], [tangents[i] for i in moving])


def _batch(primitive, num_empty_at, operands, axes, **params):
    """The vmap rule: adds one leading axis to all operands; the passes map over all leading axes."""
    [size] = {a.shape[axis] for a, axis in zip(operands, axes) if axis is not None}

    def lead(i, a, axis):
        if axis is not None:
            return jnp.moveaxis(a, axis, 0)
        return a[None] if i == num_empty_at else jnp.broadcast_to(a, (size, *a.shape))

    out = primitive.bind(*map(lead, range(len(operands)), operands, axes), **params)
    return out, [0] * len(out)


def _primitive(implementation, avals, num_empty_at=3) -> Primitive:
    def run(*operands, **params):
        # Traced when the program around it is lowered: contexts that the program was traced in are closed by then.
        with matmul_precision(operands[0].dtype):
            return list(implementation(*operands, **params))

    primitive = Primitive(f"window_attention{implementation.__name__}")
    primitive.multiple_results = True
    primitive.def_impl(jax.jit(run, static_argnames=("window", "backend", "num_keys", "fused")))
    primitive.def_abstract_eval(lambda *operands, **params: list(avals(*operands, **params)))
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    batching.primitive_batchers[primitive] = partial(_batch, primitive, num_empty_at)
    return primitive


forward_p = _primitive(_forward, _forward_avals, num_empty_at=5)
tangent_p = _primitive(_tangent, _tangent_avals)
dual_p = _primitive(_dual, _dual_avals)
dual_tangent_p = _primitive(_dual_tangent, _dual_avals)
reverse_p = _primitive(_reverse, _reverse_avals)
hessian_p = _primitive(_hessian, _hessian_avals)
second_tangent_p = _primitive(_second_tangent, _tangent_avals)
second_reverse_p = _primitive(_second_reverse, _second_reverse_avals)

ad.primitive_jvps |= {
    forward_p: _forward_jvp,
    tangent_p: _tangent_jvp,
    dual_p: _dual_jvp,
    dual_tangent_p: partial(_high_jvp, dual_tangent_p, _dual_tangent, POINT + 5),
    reverse_p: _reverse_jvp,
    hessian_p: partial(_high_jvp, hessian_p, _hessian, POINT + 2),
    second_tangent_p: partial(_high_jvp, second_tangent_p, _second_tangent, POINT + 5),
    second_reverse_p: partial(_high_jvp, second_reverse_p, _second_reverse, POINT + 5),
}
ad.primitive_transposes |= {
    tangent_p: _tangent_transpose,
    reverse_p: _reverse_transpose,
    hessian_p: _hessian_transpose,
    dual_tangent_p: _dual_tangent_transpose,
    second_tangent_p: _second_tangent_transpose,
    second_reverse_p: _second_reverse_transpose,
}
