"""Where our parameters are in the files of another program, by a table of rules that stands beside its reader.

The same table serves to read such files and to write them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from ttt_e2e.config import ModelConfig
from ttt_e2e.model import abstract_model, abstract_transformer
from ttt_e2e.model.parameters import parameter_name

BLOCK = "{block}"


class Rule(NamedTuple):
    """A parameter of ours, and the tensor that holds it."""

    ours: str  # its name, without "fast" or "slow", and without the stack of blocks
    theirs: str  # of a parameter of blocks without {block}, their index: the tensor has them all, stacked on axis 0
    transposed: bool = False


class Place(NamedTuple):
    """The tensor that holds a parameter, of one block where it is stacked."""

    tensor: str
    row: int | None = None  # on axis 0, of a tensor of several blocks


class Source(NamedTuple):
    """Where a parameter of ours is."""

    places: tuple[Place, ...]  # of each block of its stack; a single one where it is not stacked
    stacked: bool  # whether ours is
    transposed: bool
    num_rows: int = 0  # of a tensor of several blocks; else 0

    def shape(self, leaf) -> tuple[int, ...]:
        """The shape of each of its tensors; `leaf` is the parameter, or its shape."""
        shape = leaf.shape[1:] if self.stacked else leaf.shape
        shape = shape[::-1] if self.transposed else shape
        return (self.num_rows, *shape) if self.num_rows else shape

    def read(self, tensor: Callable[[str, tuple], np.ndarray], index: tuple[slice, ...], dtype) -> np.ndarray:
        """Reads a part of the parameter, tensor by tensor.

        tensor: (name, index) -> that part of the tensor.
        """
        of_block = index[1:] if self.stacked else index
        of_block = of_block[::-1] if self.transposed else of_block
        places = self.places[index[0]] if self.stacked else self.places
        parts = [tensor(name, of_block if row is None else (row, *of_block)) for name, row in places]
        parts = [np.asarray(part.T if self.transposed else part, dtype) for part in parts]
        return np.stack(parts) if self.stacked else parts[0]


def sources_of(model: ModelConfig, rules: Iterable[Rule]) -> dict[str, Source]:
    """Finds {name of a parameter: where it is}, for those parameters of a model that the rules have."""
    table = {rule.ours: rule for rule in rules}
    stacks = abstract_transformer(model).block_indices
    names = {}  # {name: (its stack, or "", its name in the table)}
    blocks = defaultdict(list)  # {name in the table: indices of the blocks that have it}
    for path, _ in jax.tree_util.tree_leaves_with_path(abstract_model(model)[1]):
        _, ours = (name := parameter_name(path)).split(".", 1)
        stack, _, of_block = ours.partition(".")
        names[name] = (stack, of_block) if stack in stacks else ("", ours)
        blocks[names[name][1]] += stacks.get(stack, [])
    return {
        name: _source(table[ours], stacks.get(stack), sorted(blocks[ours]))
        for name, (stack, ours) in names.items()
        if ours in table
    }


def _source(rule: Rule, stack: list[int] | None, blocks: list[int]) -> Source:
    """The source of a parameter of a stack of these blocks, where `blocks` have it; of none, if `stack` is None."""
    if stack is None:
        return Source((Place(rule.theirs),), False, rule.transposed)
    if BLOCK in rule.theirs:
        return Source(tuple(Place(rule.theirs.format(block=i)) for i in stack), True, rule.transposed)
    places = tuple(Place(rule.theirs, blocks.index(i)) for i in stack)
    return Source(places, True, rule.transposed, len(blocks))


def tensor_shapes(model: ModelConfig, sources: dict[str, Source]) -> dict[str, tuple[int, ...]]:
    """Lists the tensors that a model needs, {name: shape}."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_model(model)[1])
    found = {name: leaf for path, leaf in leaves if (name := parameter_name(path)) in sources}
    return {place.tensor: sources[name].shape(leaf) for name, leaf in found.items() for place in sources[name].places}


def unknown(model: ModelConfig, sources: dict[str, Source]) -> list[str]:
    """Lists the parameters of a model that the rules have not, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_model(model)[1])
    return [name for path, _ in leaves if (name := parameter_name(path)) not in sources]
