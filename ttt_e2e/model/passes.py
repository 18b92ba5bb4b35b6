"""How a block computes its expensive results, its matrix products and its attention, in each pass over it.

A block is written once and run in several kinds of pass. A pass is used for one run of one block; it tells its results
apart by their order.

Shapes: `T` positions, `D` width in, `F` width out, `N` query heads, `H` head width.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ttt_e2e.kernels import window_attention


class Pass:
    """Computes everything and keeps nothing: for reading, and where JAX's autodiff is left to itself."""

    derivatives = "any"  # as of `window_attention`
    kept: tuple[Any, ...] = ()

    def __init__(self, known: tuple[Any, ...] = ()):
        """`known`: what a `Recording` pass over the same block kept."""
        self._known = iter(known) if known else None

    def product(self, x_TD, w_DF):
        """x w, [T, F], in the dtype of x."""
        known_TF, w_DF = self._next_known(), w_DF.astype(x_TD.dtype)
        return x_TD @ w_DF if known_TF is None else _known_product(x_TD, w_DF, known_TF)

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

    def product(self, x_TD, w_DF):  # noqa: D102 (as of `Pass`)
        self.kept += (super().product(x_TD, w_DF),)
        return self.kept[-1]

    def attention(self, *arrays, **options):  # noqa: D102
        self.kept += (super().attention(*arrays, with_lse=True, **options),)
        return self.kept[-1][0]


class DualPass(Pass):
    """Is run under `jax.jvp`, and that in reverse.

    The products of a value and of its tangent with the same weight are one product over stacked rows. So is its
    transpose, and the gradient of the weight is one over a stacked contraction: the weight is read once each time. What
    is known is not computed again.

    Hidden states must have a tangent under that jvp everywhere, which a scan over blocks sees to: where there is none,
    the reverse would stack its own tangents with values, and JAX cannot linearise that.
    """

    derivatives = "reverse_of_tangent"

    def product(self, x_TD, w_DF):  # noqa: D102
        return _product(x_TD, w_DF.astype(x_TD.dtype), self._next_known())


@jax.custom_jvp
def _product(x_TD, w_DF, known_TF):
    """x w, whose tangent shares its product; `known_TF` is its value or None."""
    return _known_product(x_TD, w_DF, known_TF)


@partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(primals, tangents):
    x_TD, w_DF, known_TF = primals
    x_dot_TD, w_dot_DF, _ = tangents
    y_dot_TF = 0
    if isinstance(x_dot_TD, SymbolicZero):
        y_TF = _known_product(x_TD, w_DF, known_TF)
    else:
        y_TF, y_dot_TF = _known_pair(jnp.stack([x_TD, x_dot_TD]), w_DF, known_TF)
    if not isinstance(w_dot_DF, SymbolicZero):
        y_dot_TF = x_TD @ w_dot_DF + y_dot_TF
    return y_TF, y_dot_TF


@jax.custom_jvp
def _known_product(x, w_DF, known):
    """x w, not computed where its value is known; differentiated as if it were."""
    return x @ w_DF if known is None else known


@_known_product.defjvp
def _known_product_jvp(primals, tangents):
    x, w_DF, known = primals
    x_dot, w_dot_DF, _ = tangents
    return _known_product(x, w_DF, known), x_dot @ w_DF + x @ w_dot_DF


@jax.custom_jvp
def _known_pair(x_2TD, w_DF, known_TF):
    """x w of a value and its tangent, stacked; the value's product may be known."""
    if known_TF is None:
        return x_2TD @ w_DF
    return jnp.stack([known_TF, x_2TD[1] @ w_DF])


@_known_pair.defjvp
def _known_pair_jvp(primals, tangents):
    x_2TD, w_DF, known_TF = primals
    x_dot_2TD, w_dot_DF, _ = tangents
    return _known_pair(x_2TD, w_DF, known_TF), x_dot_2TD @ w_DF + x_2TD @ w_dot_DF
