"""What the tests of the kernels share: random problems, and every nesting of derivatives as a function.

Shapes: `T` queries, `C` cached keys, `N` query heads, `G` key/value heads, `H` head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from ttt_e2e.kernels import window_attention


class Case(NamedTuple):
    T: int
    C: int = 0
    N: int = 2
    G: int = 1
    H: int = 8
    window: int = 0
    num_empty: int = 0

    def problem(self, seed: int = 0, dtype=None) -> dict:
        """Queries, new keys and values, cached ones."""
        random = np.random.default_rng(seed)
        shapes = {"q": (self.N, self.T, self.H), "k": (self.G, self.T, self.H), "v": (self.G, self.T, self.H)}
        shapes |= {"cached_k": (self.G, self.C, self.H), "cached_v": (self.G, self.C, self.H)}
        return {name: jnp.asarray(random.normal(size=shape), dtype) for name, shape in shapes.items()}

    def attend(self, x: dict, backend: str = "xla", **options):
        cached = {name: x[name] for name in ("cached_k", "cached_v")}
        options |= {"window": self.window, "num_empty": self.num_empty, "backend": backend}
        return window_attention(x["q"], x["k"], x["v"], **cached, **options)


def nestings(attend, x: dict, y: dict, bar) -> dict:
    """Name -> a nesting of jvp and vjp at x, in direction y; `inner_*` move the new keys alone on the inside."""
    new = ("q", "k", "v")
    x_new, y_new = ({name: z[name] for name in new} for z in (x, y))

    def loss(x):
        return jnp.sum(bar * attend(x) ** 2)

    def squared_gradient(function):
        return lambda z: sum(jnp.vdot(g, g) for g in jax.tree.leaves(jax.grad(function)(z)))

    def along(function, direction):
        return lambda z: jax.jvp(function, (z,), (direction,))[1]

    def on_new(x):
        return lambda z: loss(x | z)

    return {
        "primal": lambda: attend(x),
        "jvp": lambda: along(attend, y)(x),
        "vjp": lambda: jax.grad(loss)(x),
        "vjp_of_vjp": lambda: jax.grad(squared_gradient(loss))(x),
        "jvp_of_vjp": lambda: along(jax.grad(loss), y)(x),
        "vjp_of_jvp": lambda: jax.grad(lambda xy: along(loss, xy[1])(xy[0]))((x, y)),
        "jvp_of_jvp": lambda: along(along(loss, y), y)(x),
        "inner_vjp": lambda: jax.grad(lambda x: squared_gradient(on_new(x))(x_new | {n: x[n] for n in new}))(x),
        "inner_jvp": lambda: jax.grad(lambda x: along(on_new(x), y_new)({n: x[n] for n in new}))(x),
    }


def third_derivatives(attend, x: dict, y: dict, bar) -> dict:
    """Two of them."""

    def loss(x):
        return jnp.sum(bar * attend(x) ** 2)

    def along(function):
        return lambda z: jax.jvp(function, (z,), (y,))[1]

    return {
        "vjp_of_jvp_of_jvp": lambda: jax.grad(along(along(loss)))(x),
        "jvp_of_vjp_of_vjp": lambda: along(jax.grad(lambda z: jnp.sum(jax.grad(loss)(z)["k"] ** 2)))(x),
    }


def results(functions: dict):
    """All of them, compiled as one program."""
    return jax.jit(lambda: {name: function() for name, function in functions.items()})()


def relative_error(actual, expected) -> float:
    """Worst of all arrays, by Euclidean norm; NaN counts as infinite."""
    errors = [0.0]
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-100) if a.size else 0.0
        errors.append(np.inf if np.isnan(error) else error)
    return max(errors)


def for_target(platform: str, kind: str, axis_type=AxisType.Manual):
    """A context in which programs are traced for another accelerator."""
    device = AbstractDevice(kind, None, platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((8,), ("data",), (axis_type,), abstract_device=device))
