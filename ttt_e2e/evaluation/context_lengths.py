"""Loss of the same held-out tokens as the context before them grows.

Shapes: `B` sequences, `L` tokens of context.
"""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ttt_e2e.config import Config
from ttt_e2e.data.store import TokenStore
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.fixed_batches import batches, fill_up
from ttt_e2e.evaluation.records import Records, identify
from ttt_e2e.inference.generate import load_reader
from ttt_e2e.inference.reading import read
from ttt_e2e.train.batches import open_store

NAME = "context_lengths"


@dataclass(frozen=True)
class Settings:
    """What is asked for. Raises `UserError` for what means nothing."""

    lengths: tuple[int, ...]  # tokens of context
    scored_tokens: int = 0  # the last ones of each stretch, whose loss is taken; 0 = as many as the shortest length
    num_stretches: int = 32  # at most; 0 = all

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"context_lengths is {list(self.lengths)}, but it takes integers of at least 1")
        # However the same is asked for, the settings are the same: records are tied to them. (The class is frozen.)
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        if not 0 <= self.scored_tokens <= self.lengths[0]:
            raise UserError(
                f"scored_tokens is {self.scored_tokens}, but it must be at least 0 (0 = the shortest of "
                f"context_lengths) and at most the shortest, {self.lengths[0]}"
            )
        object.__setattr__(self, "scored_tokens", self.scored_tokens or self.lengths[0])
        if self.num_stretches < 0:
            raise UserError(f"num_stretches is {self.num_stretches}, but it must be at least 0 (0 = all)")


def check(config: Config, settings: Settings) -> TokenStore:
    """The held-out text. Raises `UserError` where it does not fit the config, or is shorter than the longest length."""
    store, longest = open_store(config, config.data.eval_split), settings.lengths[-1]
    if store.num_tokens < longest + 1:
        raise UserError(
            f"context_lengths has {longest}, but split {config.data.eval_split} of {config.data.path} has "
            f"{store.num_tokens} tokens: it must be at most {store.num_tokens - 1}"
        )
    return store


def evaluate(config: Config, checkpoint, output, settings: Settings) -> dict:
    """Reads the ends of held-out stretches, of every length, and takes the loss of the same last tokens.

    A stretch is as long as the longest length, and stretches follow each other in the split. Writes
    `context_lengths.jsonl` and `context_lengths.json`, which is returned, into the directory `output`.

    Raises:
      UserError: no such checkpoint, or it, the token store or the settings do not fit the config.
    """
    store, longest = check(config, settings), settings.lengths[-1]
    available = store.num_sequences(longest)
    stretches = range(min(settings.num_stretches or available, available))
    B = min(config.eval.batch_size, len(stretches))
    reader = load_reader(config, checkpoint, longest)
    about = identify(config, checkpoint, reader, store, settings)
    records = Records(output, NAME, about, key=("length", "stretch"))
    todo = [
        (length, batch)
        for length in settings.lengths
        for batch in batches(stretches, B)
        if not all(records.has(length, stretch) for stretch in batch)
    ]
    modes = {"": True, "_without_learning": False} if config.model.num_fast_blocks else {"": True}
    total = sum(length for length, _ in todo) * B * len(modes)
    with tqdm(total=total, desc="context lengths", unit="token", unit_scale=True, disable=not todo) as bar:
        for length, batch in todo:
            tokens = store.sequences(fill_up(batch, B), longest, config.model.vocab_size)[:, longest - length :]
            is_scored = _is_scored(tokens, settings.scored_tokens, config.data.bos_id)
            found = [
                {"length": length, "stretch": n, "num_targets": int(is_scored[i].sum())} for i, n in enumerate(batch)
            ]
            for suffix, learn in modes.items():
                _, nll_BL = read(reader, reader.start(tokens[:, 0], B), tokens[:, 1:], bar, learn=learn)
                nll = nll_BL[:, -settings.scored_tokens :]
                for i, record in enumerate(found):
                    record[f"nll{suffix}"] = float(nll[i, is_scored[i]].sum(dtype=np.float64))
            records.add(found)
    return records.finish(summarise(list(records.done.values()), settings, about["step"]))


def summarise(records: list[dict], settings: Settings, step: int) -> dict:
    """The result, from a record for each stretch and length: `nll` is summed over its `num_targets`."""
    by_length = {length: [r for r in records if r["length"] == length] for length in settings.lengths}
    shortest = sorted(by_length[settings.lengths[0]], key=lambda r: r["stretch"])
    lengths = []
    for length, found in by_length.items():
        found, entry = sorted(found, key=lambda r: r["stretch"]), {"length": length}
        counts = np.array([r["num_targets"] for r in found], np.float64)
        for suffix in ("", "_without_learning"):
            if f"nll{suffix}" not in found[0]:
                continue
            sums, base = (np.array([r[f"nll{suffix}"] for r in of]) for of in (found, shortest))
            loss, difference = ratio(sums, counts), ratio(sums - base, counts)
            entry |= {f"loss{suffix}": loss[0], f"standard_error{suffix}": loss[1]}
            entry |= {f"difference{suffix}": difference[0], f"difference_standard_error{suffix}": difference[1]}
        lengths.append(entry)
    return {
        "step": step,
        "lengths": lengths,
        "scored_tokens": settings.scored_tokens,
        "num_stretches": len(shortest),
        "num_targets": sum(r["num_targets"] for r in shortest),
    }


def ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float | None, float | None]:
    """The mean, sum(sums) / sum(counts), and its standard error over the stretches; None where there are too few."""
    n = len(sums)
    if not counts.sum():
        return None, None
    mean = sums.sum() / counts.sum()
    residuals = sums - mean * counts
    error = np.sqrt((residuals**2).sum() / (n * (n - 1))) / counts.mean() if n > 1 else None
    return float(mean), None if error is None else float(error)


def _is_scored(tokens: np.ndarray, scored_tokens: int, bos_id: int) -> np.ndarray:
    """Which of the last `scored_tokens` targets count [B, scored_tokens]: BOS is no target, as in training."""
    targets = tokens[:, -scored_tokens:]
    return (targets != bos_id) | (bos_id == 0)
