"""Parameter types and initialisers. `FastParam` is the boundary between fast and slow weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class FastParam(nnx.Param):
    """A weight that the inner loop changes; its stored value is the meta-learned initialisation W_0."""


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], config, axes: tuple, kind: type[nnx.Param] = nnx.Param) -> nnx.Param:
    """A matrix stored [in, out], drawn from a normal of standard deviation `config.initializer_range`.

    axes: what its dimensions are (`parameter_axes`).
    """
    init = jax.nn.initializers.normal(config.initializer_range)
    return kind(init(rngs.params(), shape, jnp.dtype(config.param_dtype)), axes=axes)


def vector(value, config, axis: str | None = None) -> nnx.Param:
    """A parameter [size] that is used in its own dtype, as the weights of norms are; `axis`: what its dimension is."""
    return nnx.Param(jnp.asarray(value, jnp.dtype(config.param_dtype)), axes=(axis,))


def at_least_float32(dtype):
    """float32, or `dtype` where that is wider: what norms, rotations, logits and losses are computed in."""
    return jnp.promote_types(dtype, jnp.float32)


def split(model: nnx.Module):
    """(graphdef, fast, slow): the static structure and the two sets of weights, as nested dicts of arrays."""
    graphdef, fast, slow = nnx.split(model, FastParam, ...)
    return graphdef, nnx.to_pure_dict(fast), nnx.to_pure_dict(slow)


def merge(graphdef, fast, slow) -> nnx.Module:
    """The model whose weights are those of the nested dicts `fast` and `slow`: the inverse of `split`."""
    return nnx.merge(graphdef, nnx.State(fast), nnx.State(slow))


def parameter_name(path) -> str:
    """Dotted name of a leaf, e.g. "slow.prefix.attention.wq"."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def parameter_axes(model: nnx.Module) -> dict[str, tuple]:
    """{dotted name: what its last dimensions are} of all parameters of a model, or of its shapes.

    A dimension is "vocabulary", "width" (of the model), "heads" (columns of several heads), "head_width", "mlp", or
    None: nothing that others have in common. cluster/mesh.py says which of these the devices divide among them.
    """
    _, fast, slow = nnx.split(model, FastParam, ...)
    leaves = [(("fast", *path), p) for path, p in nnx.to_flat_state(fast)]
    leaves += [(("slow", *path), p) for path, p in nnx.to_flat_state(slow)]
    return {".".join(map(str, path)): parameter.get_metadata()["axes"] for path, parameter in leaves}


class Structure(NamedTuple):
    """A module without its weights."""

    graphdef: Any  # what is static
    fast: Any  # shapes of the fast weights
    module: nnx.Module  # with shapes in place of weights: answers what depends on sizes alone

    def bind(self, fast, slow) -> nnx.Module:
        """The module with weights."""
        return merge(self.graphdef, fast, slow)


def structure_of(graphdef, fast, slow) -> Structure:
    """The structure of a module with these weights, or others of their shapes."""
    fast, slow = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), (fast, slow))
    return Structure(graphdef, fast, merge(graphdef, fast, slow))


class Directed(NamedTuple):
    """A fast weight with its tangent: takes the place of the weight in a dual pass (passes.py)."""

    weight: jax.Array
    direction: jax.Array
