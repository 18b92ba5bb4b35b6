"""How a block computes its results in each kind of pass over it.

A block is written once and run in several kinds of pass: on values alone, by whose shapes its arrays are named, or on
values and their tangents at once. A pass is used for one run of one block; it tells its expensive results apart by
their order.

Shapes: `T` positions, `D` width in, `F` width out, `N` query heads, `H` head width; `P` = 2 for a value and its
tangent, stacked, or 1 for a value that has none.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ttt_e2e.kernels import window_attention
from ttt_e2e.model.parameters import Directed
from ttt_e2e.model.parts import sum_to_all


class Pass:
    """Computes everything and keeps nothing: for reading, and where JAX's autodiff is left to itself."""

    derivatives = "any"  # as of `window_attention`
    kept: tuple[Any, ...] = ()

    def __init__(self, known: tuple[Any, ...] = ()):
        """`known`: what a `Recording` pass over the same block kept."""
        self._known = iter(known) if known else None

    def begin(self, x_TD, *, in_scan: bool):
        """What enters the first block. `in_scan`: it keeps its shape from block to block, as a scan's carry must."""
        return x_TD

    def lift(self, function, *arrays):
        """What becomes of a cheap function: applied to arrays, gives an array."""
        return function(*arrays)

    def value(self, array):
        """An array without its tangent, where it has one."""
        return array

    def product(self, x_TD, w_DF, *, divided: bool = False):
        """x w, [T, F], in the dtype of x. `divided`: both are one device's part of D, and the result is summed."""
        known_TF, operands = self._next_known(), (x_TD, w_DF.astype(x_TD.dtype))
        product = partial(_product, divided)
        return product(*operands) if known_TF is None else _known(product, operands, known_TF)

    def attention(self, *arrays, **options):
        """`window_attention` of the same arguments."""
        return window_attention(*arrays, derivatives=self.derivatives, known=self._next_known(), **options)

    def _next_known(self):
        return None if self._known is None else next(self._known)


class FirstOrderPass(Pass):
    """Is differentiated once at most."""

    derivatives = "first_order"


class Recording(Pass):
    """Keeps the results, in order."""

    def product(self, x_TD, w_DF, *, divided: bool = False):  # noqa: D102 (as of `Pass`)
        self.kept += (super().product(x_TD, w_DF, divided=divided),)
        return self.kept[-1]

    def attention(self, *arrays, **options):  # noqa: D102
        self.kept += (super().attention(*arrays, with_lse=True, **options),)
        return self.kept[-1][0]


class DualPass(Pass):
    """Runs on values and their tangents: every array of a block has a leading axis P. Is differentiated once.

    Tangents come from those of the hidden states and from fast weights, which are `Directed`. Products of a value and
    of its tangent with the same weight are one product over stacked rows. So is its transpose, and the gradient of the
    weight is one over a stacked contraction: the weight is read once each time. What is known is not computed again.
    """

    def begin(self, x_TD, *, in_scan: bool):
        """Hidden states before any fast MLP have no tangents, or in a scan tangents of 0."""
        return jnp.stack([x_TD, jnp.zeros_like(x_TD)]) if in_scan else x_TD[None]

    def lift(self, function, *arrays_P):  # noqa: D102
        parts = [_parts(a) for a in arrays_P]
        values = [part[0] for part in parts]
        if all(len(part) == 1 for part in parts):
            return function(*values)[None]
        tangents = [part[1] if len(part) == 2 else jnp.zeros_like(part[0]) for part in parts]
        return jnp.stack(jax.jvp(function, values, tangents))

    def value(self, array_P):  # noqa: D102
        return array_P[0]

    def product(self, x_PTD, w_DF, *, divided: bool = False):  # noqa: D102
        weights = [w.astype(x_PTD.dtype) for w in (w_DF if isinstance(w_DF, Directed) else [w_DF])]
        known_TF, product, operands = self._next_known(), partial(_dual_product, divided), (x_PTD, *weights)
        if known_TF is None:
            return product(*operands)
        tangent = sum_to_all(_along(x_PTD, *weights), divided)
        return _known(product, operands, jnp.concatenate([known_TF[None], tangent]))

    def attention(self, *arrays_P, **options):  # noqa: D102
        has_tangent = len(arrays_P[0]) == 2
        options |= {"derivatives": "reverse_of_tangent" if has_tangent else "first_order", "known": self._next_known()}
        return self.lift(lambda *arrays: window_attention(*arrays, **options), *arrays_P)


def _parts(array_P):
    """The value, and the tangent where there is one; split, as the transpose of slices would pad and add."""
    return [jnp.squeeze(part, 0) for part in jnp.split(array_P, len(array_P))]


def _product(divided: bool, x_TD, w_DF):
    return sum_to_all(x_TD @ w_DF, divided)


def _dual_product(divided: bool, x_PTD, w_DF, u_DF=None):
    """x w of a value and its tangent, where w has the tangent u, or none: [P, T, F]."""
    y_PTF = x_PTD @ w_DF
    if u_DF is not None:
        y_TF, *along_x_TF = _parts(y_PTF)
        y_PTF = jnp.stack([y_TF, sum(along_x_TF, x_PTD[0] @ u_DF)])
    return sum_to_all(y_PTF, divided)


def _along(x_PTD, w_DF, u_DF=None):
    """The tangent of x w alone, [1, T, F]; of a value without one, [0, T, F]."""
    along_x = x_PTD[1:] @ w_DF
    if u_DF is None:
        return along_x
    along_w = (x_PTD[0] @ u_DF)[None]
    return along_x + along_w if len(along_x) else along_w


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _known(function, operands, result):
    """`function` of the operands, whose result is known: not computed, but differentiated as if it were."""
    return result


@_known.defjvp
def _known_jvp(function, primals, tangents):
    operands, result = primals
    return _known(function, operands, result), jax.jvp(function, operands, tangents[0])[1]
