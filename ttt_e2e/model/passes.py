"""The kinds of pass over a block: on values, on values with results recorded, on values and tangents.

The code of a block is written once, in terms of a pass (`compute`), and run in several kinds:

    Pass            computes everything
    FirstOrderPass  the same, where it is differentiated once at most: fused attention kernels may be used
    Recording       the same, and records the results of products and attention under names (`results`)
    DualPass        computes values and their tangents together (JVP), taking recorded results instead of computing them

Arrays in a block are named by the shapes of their values; in a `DualPass` each has one more leading axis J, value and
tangent. A pass object serves one run of one block.

Shapes: `T` positions, `D` width in, `F` width out, `N` query heads, `H` head width; `J` = 2 for a value and its
tangent, stacked, or 1 for a value without a tangent.
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

    derivatives = "any"  # what `window_attention` must be differentiable for

    def __init__(self, recorded: dict[str, Any] | None = None):
        """recorded: {name: result} of a `Recording` pass over the same block; these are not computed again."""
        self._recorded = recorded or {}
        self.results: dict[str, Any] = {}  # {name: result} that this pass records

    def begin(self, x_TD, *, in_scan: bool):
        """Converts hidden states [T, D] to the form in which blocks of this pass take them.

        in_scan: whether they are the carry of a scan over blocks, whose shape must not change from block to block.
        """
        return x_TD

    def call(self, function, arrays, *constants):
        """Runs any JAX function (arrays, *constants) -> (outputs, values).

        arrays: a pytree of arrays that may have tangents; then `outputs` have tangents, too.
        constants: arguments without tangents. Nor have `values` any, such as a mixer's Entry.
        """
        return function(arrays, *constants)

    def apply(self, function, *arrays):
        """Applies a cheap function of arrays that returns one array, such as a norm or a sum."""
        return self.call(lambda arrays: (function(*arrays), None), arrays)[0]

    def value(self, array):
        """Drops the tangent of an array, if it has one."""
        return array

    def product(self, name: str, x_TD, w_DF, *, divided: bool = False):
        """Multiplies x [T, D] by w [D, F], in the dtype of x.

        divided: whether x and w have only this device's part of D; then the products are summed over the devices.
        """
        operands, product = (x_TD, w_DF.astype(x_TD.dtype)), partial(_product, divided)
        if name in self._recorded:
            return _recorded_result(product, operands, self._recorded[name])
        return product(*operands)

    def attention(self, name: str, *arrays, **options):
        """Computes `window_attention` of the same arguments; `name` as in `product`."""
        return window_attention(*arrays, derivatives=self.derivatives, recorded=self._recorded.get(name), **options)


class FirstOrderPass(Pass):
    """Computes everything, and is differentiated once at most: fused attention kernels may be used."""

    derivatives = "first_order"


class Recording(Pass):
    """Computes everything, and records the results of products and attention by name."""

    def product(self, name: str, x_TD, w_DF, *, divided: bool = False):  # noqa: D102 (see `Pass`)
        return self._record(name, super().product(name, x_TD, w_DF, divided=divided))

    def attention(self, name: str, *arrays, with_lse: bool = False, **options):  # noqa: D102
        out, lse = self._record(name, super().attention(name, *arrays, with_lse=True, **options))
        return (out, lse) if with_lse else out

    def _record(self, name: str, result):
        if name in self.results:
            raise ValueError(f"two results of a block are named {name!r}: a reverse pass could not tell them apart")
        self.results[name] = result
        return result


class DualPass(Pass):
    """Computes values and tangents together: every array of a block has a leading axis J. Is differentiated once.

    The sources of tangents are the fast weights, which come as `Directed` (weight, tangent). From the first fast MLP
    on, hidden states have tangents.

    The products of a value and of its tangent with the same weight are one matrix product over stacked rows, [x; x_dot]
    w. Its transpose is one product over stacked rows, too, and the gradient of the weight one over a stacked
    contraction: the weight is read once each time. Values that were recorded are not computed again; their tangents
    are.
    """

    def begin(self, x_TD, *, in_scan: bool):
        """Gives hidden states no tangent, J = 1; in a scan a tangent of zeros, J = 2."""
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
        tangent = sum_to_all(_tangent_of_product(x_JTD, *weights), divided)
        return _recorded_result(product, operands, jnp.concatenate([self._recorded[name][None], tangent]))

    def attention(self, name: str, *arrays_J, **options):  # noqa: D102
        has_tangent = len(arrays_J[0]) == 2
        options |= {"derivatives": "reverse_of_tangent" if has_tangent else "first_order"}
        options |= {"recorded": self._recorded.get(name)}
        return self.call(lambda arrays: (window_attention(*arrays, **options), None), arrays_J)[0]


def _parts(array_J):
    """Splits into [value] or [value, tangent]. Not by slices: their transposes would pad with zeros and add."""
    return [jnp.squeeze(part, 0) for part in jnp.split(array_J, len(array_J))]


def _product(divided: bool, x_TD, w_DF):
    return sum_to_all(x_TD @ w_DF, divided)


def _dual_product(divided: bool, x_JTD, w_DF, u_DF=None):
    """Computes x w, and its tangent x_dot w + x u where x has the tangent x_dot or w has u: [J, T, F]."""
    y_JTF = x_JTD @ w_DF
    if u_DF is not None:
        y_TF, *x_dot_w_TF = _parts(y_JTF)  # the list is empty where x has no tangent
        y_JTF = jnp.stack([y_TF, sum(x_dot_w_TF, x_JTD[0] @ u_DF)])
    return sum_to_all(y_JTF, divided)


def _tangent_of_product(x_JTD, w_DF, u_DF=None):
    """Computes the tangent of x w alone, x_dot w + x u: [1, T, F]; [0, T, F] where neither x nor w has one."""
    x_dot_w = x_JTD[1:] @ w_DF
    if u_DF is None:
        return x_dot_w
    x_u = (x_JTD[0] @ u_DF)[None]
    return x_dot_w + x_u if len(x_dot_w) else x_u


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recorded_result(function, operands, result):
    """Returns the recorded result of `function(*operands)`: not computed again, but differentiated as if it were."""
    return result


@_recorded_result.defjvp
def _recorded_result_jvp(function, primals, tangents):
    operands, result = primals
    return _recorded_result(function, operands, result), jax.jvp(function, operands, tangents[0])[1]
