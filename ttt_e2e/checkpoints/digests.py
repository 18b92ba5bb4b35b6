"""Digests (checksums) of arrays, which reveal a damaged checkpoint. They do not depend on the sharding.

Zarr and OCDBT, in which Orbax stores arrays, check their metadata but not the data: a file with a flipped byte may
still decompress. Digests of the arrays themselves cost one pass on the device and no second read of the files, and
cover what is restored.
"""

import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.checkpoints.progress import DamagedError
from ttt_e2e.model.parameters import parameter_name


def digests(tree, spread: int = 2654435761) -> dict[str, list]:
    """{dotted name: [shape, digest]} of a tree of arrays; all processes of a run must call it, and get the same.

    A digest is the sum, modulo 2^32, of the elements' bits as integers, each times an odd number that depends on its
    position. Integer sums are exact in any order; and since odd numbers have inverses modulo 2^32, a change of any one
    element changes the digest.

    Args:
      tree: of arrays, of JAX or NumPy.
      spread: element i is multiplied by 2 * spread * i + 1. Odd, and large, so that neighbours' factors are far apart.
        Stored digests can only be compared with those of the same `spread`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {parameter_name(path): leaf for path, leaf in leaves}
    shardings = [getattr(x, "sharding", None) for x in arrays.values()]  # NumPy's arrays have none
    meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
    everywhere = NamedSharding(meshes[0], P()) if meshes else None
    sums = jax.device_get(_program(everywhere, spread)(arrays))
    return {name: [list(arrays[name].shape), int(value)] for name, value in sums.items()}


def check_digests(path, items: dict, progress: dict) -> None:
    """Raises `DamagedError` if a restored array's digest is not the recorded one; old checkpoints have no digests.

    Args:
      path: the step directory, for the message.
      items: {"params": ..., "optimizer": ...}, the restored trees of arrays, or one of them.
      progress: the step's record of progress, which holds the digests.
    """
    recorded = progress.get("arrays", {})
    restored = digests(items) if recorded else {}
    if wrong := [name for name, value in restored.items() if recorded.get(name) != value]:
        raise DamagedError(f"checkpoint {path} is damaged: {wrong[0]} is not what was saved")


@lru_cache
def _program(out_sharding, spread: int):
    """The jitted digest of a dict of arrays; cached, so that a process compiles it once for each set of shapes."""

    def digest_arrays(arrays):
        return {name: _digest(x, spread) for name, x in arrays.items()}

    return jax.jit(digest_arrays, out_shardings=out_sharding)


def _digest(x, spread: int):
    """Digest of one array, a uint32 scalar."""
    words_per_element = max(x.dtype.itemsize // 4, 1)
    word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    words = jax.lax.bitcast_convert_type(x.astype(word) if x.dtype == bool else x, word).astype(jnp.uint32)
    shape = (*x.shape, words_per_element) if words_per_element > 1 else x.shape
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
    weight = (position * np.uint32(spread)) << 1 | np.uint32(1)
    return jnp.sum(words * weight, dtype=jnp.uint32)
