"""Several token stores that are read as one, in given proportions: a mixture, "a:0.7,b:0.3"."""

import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from ttt_e2e.data.store import TokenStore, read_attributes, tokenizer_spec
from ttt_e2e.data.tokenizers import file_digest
from ttt_e2e.errors import UserError
from ttt_e2e.paths import is_url
from ttt_e2e.strict_json import to_json

_MEMBER = re.compile(r"(.+):([0-9.eE+-]+)")


class Mixture:
    """One split of several stores, with the interface of `TokenStore`.

    Sequences are in the order of the mixture: their stores take turns by their weights, each in its own order, and the
    last is where the first store ends. Tokens (`stretch`) are those of the stores one after the other.
    """

    def __init__(self, path: str, stores: Sequence[TokenStore], weights: Sequence[float]):
        self.path = path
        self.split = stores[0].split
        self.stores = tuple(stores)
        self.weights = tuple(weights)
        self.attributes = _common_attributes(path, self.stores)
        self.num_tokens = sum(store.num_tokens for store in self.stores)

    @property
    def fingerprint(self) -> str:
        """Digest, 16 hex digits, of the stores' fingerprints and weights."""
        identity = [[store.fingerprint for store in self.stores], self.weights]
        return hashlib.blake2b(to_json(identity).encode(), digest_size=8).hexdigest()

    @property
    def tokenizer_spec(self) -> str:
        """The argument of `load_tokenizer` for the tokenizer that made the stores; "" if they do not name it."""
        return next((spec for store in self.stores if (spec := store.tokenizer_spec)), "")

    def num_sequences(self, seq_len: int) -> int:
        """Number of sequences until the first store ends. Raises UserError if a store has none."""
        return len(self._order(seq_len))

    def sequences(self, indices: Sequence[int] | np.ndarray, seq_len: int, vocab_size: int = 2**31) -> np.ndarray:
        """Reads sequences by their indices in the order of the mixture, as `TokenStore.sequences`."""
        order = self._order(seq_len)
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(order)):
            raise IndexError(f"sequence {indices.min()} to {indices.max()} of {len(order)}")
        return self.numbered([order[int(index)] for index in indices], seq_len, vocab_size)

    def numbered(self, numbers: Sequence[int] | np.ndarray, seq_len: int, vocab_size: int = 2**31) -> np.ndarray:
        """Reads sequences by their numbers, which go through all of each store: int32 [len(numbers), seq_len + 1]."""
        numbers = np.asarray(numbers, np.int64)
        starts = self.starts(seq_len)
        tokens = np.empty((len(numbers), seq_len + 1), np.int32)
        for store, start, end in zip(self.stores, starts, starts[1:]):
            rows = np.flatnonzero((numbers >= start) & (numbers < end))
            if rows.size:
                tokens[rows] = store.sequences(numbers[rows] - start, seq_len, vocab_size)
        return tokens

    def starts(self, seq_len: int) -> list[int]:
        """The number of the first sequence of each store, and that after the last sequence of all."""
        counts = [store.num_sequences(seq_len) for store in self.stores]
        return [0, *np.cumsum(counts).tolist()]

    def stretch(self, start: int, stop: int, vocab_size: int = 2**31) -> np.ndarray:
        """Reads tokens `start` to `stop` - 1 of the stores one after the other, int32 [stop - start]."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        parts, before = [], 0
        for store in self.stores:
            first, last = (min(max(at - before, 0), store.num_tokens) for at in (start, stop))
            parts.append(store.stretch(first, last, vocab_size))
            before += store.num_tokens
        return np.concatenate(parts)

    def _order(self, seq_len: int) -> grain.MapDataset:
        """The numbers of the sequences in the order of the mixture."""
        starts = self.starts(seq_len)
        ranges = [grain.MapDataset.range(start, stop) for start, stop in itertools.pairwise(starts)]
        return grain.MapDataset.mix(ranges, self.weights)


def members(path: str) -> list[tuple[str, float]]:
    """The stores and weights of `data.path`, where it is a mixture, "a:0.7,b:0.3"; [] where it names one store.

    Raises UserError where only some of its stores have a weight, or one has none above 0.
    """
    parts = [part.strip() for part in path.split(",")]
    found = [_MEMBER.fullmatch(part) for part in parts]
    if not any(found):
        return []
    for part, match in zip(parts, found):
        try:
            is_legal = match and 0 < float(match[2]) < float("inf")
        except ValueError:
            is_legal = False
        if not is_legal:
            raise UserError(f"config.data.path {path!r}: {part!r} has no weight above 0; legal: STORE:0.7,STORE:0.3")
    return [(match[1], float(match[2])) for match in found]


def absolute_path(path: str) -> str:
    """`data.path` with absolute paths; those of a mixture's stores, too."""
    named = members(path)
    absolute = [place if is_url(place) else os.path.abspath(place) for place, _ in named or [(path, 1.0)]]
    return ",".join(f"{place}:{weight:g}" for place, (_, weight) in zip(absolute, named)) if named else absolute[0]


def open_tokens(path: str, split: str) -> TokenStore | Mixture:
    """Opens a split of what `data.path` names: a store, or a mixture of several.

    Raises UserError as `TokenStore.open`, and where the stores of a mixture were made with different tokenizers.
    """
    named = members(path)
    if not named:
        return TokenStore.open(path, split)
    return Mixture(path, [TokenStore.open(each, split) for each, _ in named], [weight for _, weight in named])


def recorded_tokenizer(path: str) -> tuple[str, str]:
    """The tokenizer that `data.path` records: its name, and what `load_tokenizer` takes; "" where it records none."""
    for store, _ in members(path) or [(path, 1.0)]:
        attributes = read_attributes(store)
        if name := attributes.get("tokenizer", ""):
            return name, tokenizer_spec(store, attributes)
    return "", ""


def _common_attributes(path: str, stores: Sequence[TokenStore]) -> dict[str, Any]:
    """What all stores record of their tokenizer. Raises UserError where they record different ones."""
    common = {}
    for name, of in _IDENTITY.items():
        known = [(store, value) for store in stores if (value := of(store)) not in ("", None)]
        for store, value in known:
            if value != known[0][1]:
                raise UserError(
                    f"config.data.path {path!r}: {store.path} has the {name} {value!r}, but {known[0][0].path} has"
                    f" {known[0][1]!r}; legal: stores made with one tokenizer"
                )
        if known and name in known[0][0].attributes:
            common[name] = known[0][1]
    return common


# What tells whether two stores were made with one tokenizer, with its name in messages.
_IDENTITY = {
    "tokenizer": lambda store: store.attributes.get("tokenizer"),
    "vocab_size": lambda store: store.attributes.get("vocab_size"),
    "bos_id": lambda store: store.attributes.get("bos_id"),
    "digest of the tokenizer": lambda store: file_digest(store.tokenizer_spec),
}
