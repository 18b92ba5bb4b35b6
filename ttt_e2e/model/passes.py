"""The kinds of pass over a block: on values, recording results for the reverse pass, on values and tangents.

A block is written once and run in several kinds of pass: on values alone, by whose shapes its arrays are named, or on
values and their tangents at once. A pass is used for one run of one block. Its expensive results have names, by which a
reverse pass finds what the forward pass recorded.

Shapes: `T` positions, `D` width in, `F` width out, `N` query heads, `H` head width; `J` = 2 for a value and its
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
    """Computes everything and records nothing: for reading, and where JAX's autodiff is left to itself."""

    derivatives = "any"  # as of `window_attention`

    def __init__(self, recorded: dict[str, Any] | None = None):
        """recorded: results of a `Recording` pass over the same block, which are not computed again."""
        self._recorded = recorded or {}
        self.results: dict[str, Any] = {}  # what this pass recorded

    def begin(self, x_TD, *, in_scan: bool):
        """Turns hidden states into what enters the first block.

        in_scan: the shape must stay the same from block to block, as that of a scan's carry.
        """
        return x_TD

    def call(self, function, arrays, *constants):
        """Runs any JAX function, (arrays, *constants) -> (outputs, values).

        arrays: a pytree of arrays of this pass, which may have tangents; what comes out of them, `outputs`, has, too.
        constants: have no tangents; nor do `values`, such as a mixer's Entry.
        """
        return function(arrays, *constants)

    def apply(self, function, *arrays):
        """Applies a cheap function, such as a norm or a sum, to arrays; it returns one array."""
        return self.call(lambda arrays: (function(*arrays), None), arrays)[0]

    def value(self, array):
        """Drops the tangent of an array, where it has one."""
        return array

    def product(self, name: str, x_TD, w_DF, *, divided: bool = False):
        """Multiplies x [T, D] by w [D, F], in the dtype of x.

        divided: both are one device's part of D, and the results of all devices are summed.
        """
        operands, product = (x_TD, w_DF.astype(x_TD.dtype)), partial(_product, divided)
        if name in self._recorded:
            return _recorded_result(product, operands, self._recorded[name])
        return product(*operands)

    def attention(self, name: str, *arrays, **options):
        """`window_attention` of the same arguments."""
        return window_attention(*arrays, derivatives=self.derivatives, recorded=self._recorded.get(name), **options)


class FirstOrderPass(Pass):
    """A pass that is differentiated once at most: it admits fused attention kernels."""

    derivatives = "first_order"


class Recording(Pass):
    """Records its expensive results."""

    def product(self, name: str, x_TD, w_DF, *, divided: bool = False):  # noqa: D102 (as of `Pass`)
        return self._record(name, super().product(name, x_TD, w_DF, divided=divided))

    def attention(self, name: str, *arrays, **options):  # noqa: D102
        return self._record(name, super().attention(name, *arrays, with_lse=True, **options))[0]

    def _record(self, name: str, result):
        if name in self.results:
            raise ValueError(f"two results of a block are named {name!r}: a reverse pass could not tell them apart")
        self.results[name] = result
        return result


class DualPass(Pass):
    """Runs on values and their tangents: every array of a block has a leading axis J. Is differentiated once.

    Tangents come from those of the hidden states and from fast weights, which are `Directed`. Products of a value and
    of its tangent with the same weight are one product over stacked rows. So is its transpose, and the gradient of the
    weight is one over a stacked contraction: the weight is read once each time. What was recorded is not computed
    again.
    """

    def begin(self, x_TD, *, in_scan: bool):
        """Hidden states before any fast MLP have no tangents, or in a scan tangents of 0."""
        return jnp.stack([x_TD, jnp.zeros_like(x_TD)]) if in_scan else x_TD[None]

    def call(self, function, arrays, *constants):  # noqa: D102
        leaves, structure = jax.tree.flatten(arrays)
        parts = [_parts(leaf) for leaf in leaves]
        values = structure.unflatten([part[0] for part in parts])
        if all(len(part) == 1 for part in parts):
            outputs, extra = function(values, *constants)
            return jax.tree.map(lambda a: a[None], outputs), extra
        tangents = structure.unflatten([part[1] if len(part) == 2 else jnp.zeros_like(part[0]) for part in parts])
        outputs, tangents, extra = jax.jvp(lambda x: function(x, *constants), (values,), (tangents,), has_aux=True)
        return jax.tree.map(lambda *pair: jnp.stack(pair), outputs, tangents), extra

    def value(self, array_J):  # noqa: D102
        return array_J[0]

    def product(self, name: str, x_JTD, w_DF, *, divided: bool = False):  # noqa: D102
        weights = [w.astype(x_JTD.dtype) for w in (w_DF if isinstance(w_DF, Directed) else [w_DF])]
        product, operands = partial(_dual_product, divided), (x_JTD, *weights)
        if name not in self._recorded:
            return product(*operands)
        tangent = sum_to_all(_along(x_JTD, *weights), divided)
        return _recorded_result(product, operands, jnp.concatenate([self._recorded[name][None], tangent]))

    def attention(self, name: str, *arrays_J, **options):  # noqa: D102
        has_tangent = len(arrays_J[0]) == 2
        options |= {"derivatives": "reverse_of_tangent" if has_tangent else "first_order"}
        options |= {"recorded": self._recorded.get(name)}
        return self.apply(lambda *arrays: window_attention(*arrays, **options), *arrays_J)


def _parts(array_J):
    """[value], or [value, tangent]; by a split, since the transpose of slices would pad and add."""
    return [jnp.squeeze(part, 0) for part in jnp.split(array_J, len(array_J))]


def _product(divided: bool, x_TD, w_DF):
    return sum_to_all(x_TD @ w_DF, divided)


def _dual_product(divided: bool, x_JTD, w_DF, u_DF=None):
    """x w of a value and its tangent, where w has the tangent u, or none: [J, T, F]."""
    y_JTF = x_JTD @ w_DF
    if u_DF is not None:
        y_TF, *along_x_TF = _parts(y_JTF)
        y_JTF = jnp.stack([y_TF, sum(along_x_TF, x_JTD[0] @ u_DF)])
    return sum_to_all(y_JTF, divided)


def _along(x_JTD, w_DF, u_DF=None):
    """The tangent of x w alone, [1, T, F]; of a value without one, [0, T, F]."""
    along_x = x_JTD[1:] @ w_DF
    if u_DF is None:
        return along_x
    along_w = (x_JTD[0] @ u_DF)[None]
    return along_x + along_w if len(along_x) else along_w


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recorded_result(function, operands, result):
    """`function` of the operands, whose result was recorded: not computed, but differentiated as if it were."""
    return result


@_recorded_result.defjvp
def _recorded_result_jvp(function, primals, tangents):
    operands, result = primals
    return _recorded_result(function, operands, result), jax.jvp(function, operands, tangents[0])[1]
