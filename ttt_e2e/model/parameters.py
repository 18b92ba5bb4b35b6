"""Parameter types and initialisers. `FastParam` is the boundary between fast and slow weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class FastParam(nnx.Param):
    """A weight that the inner loop changes. Its stored value is W_0, the meta-learned initialisation."""


class Traits(NamedTuple):
    """What the code that shards and trains a parameter knows of it, apart from its shape.

    A dimension is named "vocabulary", "width" (of the model), "heads" (columns of several heads, or one number a head),
    "head_width", "mlp", or "rows" or "columns" (of Engram's tables, which devices do not gather); None is one that is
    never sharded. cluster/mesh.py says over which mesh axis each of them is sharded.
    """

    axes: tuple  # names of its last dimensions
    is_cast: bool  # whether it is used in the compute dtype, as matrices are, not in its own, as norms' weights are
    decays: bool = True  # whether weight decay applies to it
    rate: float = 1.0  # factor on the outer learning rate
    num_heads: int = 1  # heads that a dimension named "heads" holds


def parameter(
    value,
    config,
    axes: tuple,
    *,
    kind: type[nnx.Param] = nnx.Param,
    decays: bool = True,
    rate: float = 1.0,
    is_cast: bool | None = None,
) -> nnx.Param:
    """Makes a parameter with this initial value, stored in `config.param_dtype`. For the others see `Traits`.

    is_cast: None = whether it has two dimensions or more.
    """
    is_cast = len(axes) > 1 if is_cast is None else is_cast
    value = jnp.asarray(value, jnp.dtype(config.param_dtype))
    return kind(value, axes=axes, decays=decays, rate=rate, is_cast=is_cast)


def matrix(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    config,
    axes: tuple,
    kind: type[nnx.Param] = nnx.Param,
    *,
    std: float | None = None,
) -> nnx.Param:
    """Makes a matrix [in, out], drawn from a normal distribution.

    axes: names of its dimensions (`Traits`). std: standard deviation; None = `config.initializer_range`.
    """
    init = jax.nn.initializers.normal(config.initializer_range if std is None else std)
    return parameter(init(rngs.params(), shape, jnp.dtype(config.param_dtype)), config, axes, kind=kind)


def vector(value, config, axis: str | None = None, *, decays: bool = True) -> nnx.Param:
    """Makes a parameter [size] that is used in its own dtype, as a norm's weight is; `axis` names its dimension."""
    return parameter(value, config, (axis,), decays=decays)


def constant(value, axes: tuple) -> nnx.Param:
    """Makes an array that is stored with the parameters and never trained, such as one of ids; kept in float32."""
    return nnx.Param(jnp.asarray(value, jnp.float32), axes=axes, decays=False, rate=0.0, is_cast=False)


def at_least_float32(dtype):
    """Returns float32, or `dtype` where that is wider: the dtype of norms, rotations, logits and losses."""
    return jnp.promote_types(dtype, jnp.float32)


def split(model: nnx.Module):
    """Splits a model into (graphdef, fast, slow): static structure, and weights as two nested dicts of arrays."""
    graphdef, fast, slow = nnx.split(model, FastParam, ...)
    return graphdef, nnx.to_pure_dict(fast), nnx.to_pure_dict(slow)


def merge(graphdef, fast, slow) -> nnx.Module:
    """Makes the model with the weights of the nested dicts `fast` and `slow`: the inverse of `split`."""
    return nnx.merge(graphdef, nnx.State(fast), nnx.State(slow))


def parameter_name(path) -> str:
    """Names a leaf by its path in a tree, dotted, e.g. "slow.prefix.attention.wq"."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def list_traits(model: nnx.Module) -> dict[str, Traits]:
    """Lists {dotted name: traits} of all parameters of a model, which may have shapes for arrays."""
    _, fast, slow = nnx.split(model, FastParam, ...)
    leaves = [(("fast", *path), p) for path, p in nnx.to_flat_state(fast)]
    leaves += [(("slow", *path), p) for path, p in nnx.to_flat_state(slow)]

    def traits(metadata: dict) -> Traits:
        return Traits(**{name: metadata[name] for name in ("axes", "is_cast", "decays", "rate")})

    return {".".join(map(str, path)): traits(p.get_metadata()) for path, p in leaves}


class Structure(NamedTuple):
    """A module without its weights."""

    graphdef: Any  # static structure, as `split` returns it
    fast: Any  # shapes of the fast weights
    module: nnx.Module  # the module with shapes in place of weights: for its config, and methods that read no weight

    def bind(self, fast, slow) -> nnx.Module:
        """Makes the module with these weights."""
        return merge(self.graphdef, fast, slow)


def structure_of(graphdef, fast, slow) -> Structure:
    """Makes the structure of a module from its graphdef and its weights, or arrays of their shapes."""
    fast, slow = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), (fast, slow))
    return Structure(graphdef, fast, merge(graphdef, fast, slow))


class Directed(NamedTuple):
    """A fast weight with its tangent, in place of the weight in a `DualPass` (passes.py)."""

    weight: jax.Array
    direction: jax.Array
