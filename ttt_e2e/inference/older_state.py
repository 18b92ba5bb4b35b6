"""Converts states saved in an older format: one KV cache for all prefix blocks, and one for all suffix blocks.

    {"fast", "cache_LBGKH": {"prefix", "suffix"}, "recent_LBGbH": {"prefix", "suffix"}, "tokens_Bb"}

The caches of all blocks had the same length K. In a model of several mixers, block i used mixer i modulo their number.

Shapes: `L` blocks, `B` sequences, `G` key/value heads, `K` positions of a KV cache, `b` inner mini-batch, `H` head
width.
"""

import jax.numpy as jnp

from ttt_e2e.checkpoints import older
from ttt_e2e.inference.reader import ENDLESS, Reader
from ttt_e2e.model.rope import rotate

NAMES = {"fast": "fast", "states": "cache_LBGKH", "drafts": "recent_LBGbH", "tokens": "tokens_Bb"}


def containers(tree: dict) -> dict:
    """Rearranges the fields of a `ReaderState` into the pytree that was saved; the arrays may have any shape."""
    return {old: older.one_stack(tree[new], lambda *stacks: stacks[0]) for new, old in NAMES.items()}


def convert(tree: dict, reader: Reader) -> dict:
    """Converts a saved pytree in the older format, with shapes as above, to the fields of a `ReaderState`."""
    config = reader.config.model
    count, stacks = len(config.mixers), reader.model.stacks
    states, drafts = (older.by_mixer(tree[name], count) for name in ("cache_LBGKH", "recent_LBGbH"))
    for name, stack in stacks.items():
        if stack.mixer.grows:
            continue
        K, capacity = states[name].k.shape[-2], stack.mixer.capacity(ENDLESS)
        states[name] = stack.mixer.resize(states[name], capacity)
        # Keys of the unfinished mini-batch were rotated at positions from K on; in the resized cache they are at
        # positions from `capacity` on.
        moved = jnp.full(drafts[name].k.shape[-2], capacity - K)
        k = rotate(drafts[name].k, moved, theta=config.rope_theta, style=config.rope_style)
        drafts[name] = drafts[name]._replace(k=k)
    fast = older.by_mixer(tree["fast"], count, axis=1)
    return {"fast": fast, "states": states, "drafts": drafts, "tokens": tree["tokens_Bb"]}
