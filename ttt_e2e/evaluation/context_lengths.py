"""Evaluates the loss of the same held-out tokens after contexts of several lengths.

Shapes: `B` sequences, `L` tokens of context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ttt_e2e.data.masking import is_target
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.base import Evaluation, register
from ttt_e2e.evaluation.plots import colors_of
from ttt_e2e.evaluation.records import Records, read_records
from ttt_e2e.evaluation.subject import Subject
from ttt_e2e.evaluation.text_bytes import TextBytes, bits_per_byte
from ttt_e2e.figures import STYLE, add_legend, make_figure
from ttt_e2e.progress import progress_bar
from ttt_e2e.settings import setting

if TYPE_CHECKING:
    from ttt_e2e.evaluation.runs import Run


@dataclass(frozen=True)
class Settings:
    """Settings of the evaluation, made from its flags. Raises `UserError` for an illegal value."""

    lengths: tuple[int, ...] = setting(
        "context_lengths",
        "Instead: loss of the same held-out tokens after contexts of these lengths, as 1024,2048,4096.",
    )
    scored_tokens: int = setting(
        "scored_tokens", "Last tokens of a context that the loss is taken of; 0 = as many as the shortest length.", 0
    )
    num_stretches: int = setting(
        "num_stretches", "At most as many stretches of held-out text, each of the longest length; 0 = all.", 32
    )

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"context_lengths is {list(self.lengths)}, but it takes integers of at least 1")
        # Settings are stored in a normal form, since records are continued only where settings are equal. The class is
        # frozen, hence `object.__setattr__`.
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        if not 0 <= self.scored_tokens <= self.lengths[0]:
            raise UserError(
                f"scored_tokens is {self.scored_tokens}, but it must be at least 0 (0 = the shortest of "
                f"context_lengths) and at most the shortest, {self.lengths[0]}"
            )
        object.__setattr__(self, "scored_tokens", self.scored_tokens or self.lengths[0])
        if self.num_stretches < 0:
            raise UserError(f"num_stretches is {self.num_stretches}, but it must be at least 0 (0 = all)")


@register
class ContextLengths(Evaluation):
    """Reads the last L tokens of held-out stretches, for each length L; loss of the same last tokens of all of them."""

    name = "context_lengths"
    Settings = Settings
    fields = ("lengths", "scored_tokens", "num_stretches")
    caption = (
        "Loss by length of the context: the same last tokens of the same held-out stretches, as the context before "
        "them grows. Solid: as trained; dashed: the same model not learning. Bars: one standard error, over stretches. "
        "Grey lines: the length that a model was trained at. Lower panel, of one run: difference from its shortest "
        "length; of several: difference from the first of them at the same length, with bars where both read the same "
        "stretches, paired by stretch."
    )

    def check(self, subject: Subject, settings: Settings) -> None:
        """Raises `UserError` where the held-out text does not fit the config, or is shorter than the longest length."""
        store, longest = subject.store, settings.lengths[-1]
        if store.num_tokens < longest + 1:
            data = subject.config.data
            raise UserError(
                f"context_lengths has {longest}, but split {data.eval_split} of {data.path} has "
                f"{store.num_tokens} tokens: it must be at most {store.num_tokens - 1}"
            )

    def evaluate(self, subject: Subject, output, settings: Settings) -> dict:
        """Reads every stretch at every length. Stretches are adjacent, and each as long as the longest length."""
        self.check(subject, settings)
        config, store, longest = subject.config, subject.store, settings.lengths[-1]
        available = store.num_sequences(longest)
        num_stretches = min(settings.num_stretches or available, available)
        B = min(config.eval.batch_size, num_stretches)
        reader = subject.reader(longest)
        records = Records(output, self.name, subject.about(reader, settings), key=("length", "stretch"))
        todo = [
            (length, *batches)
            for length in settings.lengths
            for batches in records.unfinished((length,), num_stretches, B)
        ]
        modes = {"": True, "_without_learning": False} if config.model.num_fast_blocks else {"": True}
        total = sum(length for length, *_ in todo) * B * len(modes)
        with progress_bar(total=total, desc="context lengths", unit="token", unit_scale=True, disable=not todo) as bar:
            for length, batch, filled in todo:
                tokens = store.sequences(filled, longest, config.model.vocab_size)[:, longest - length :]
                is_scored = is_target(tokens[:, -settings.scored_tokens :], config.data.masked_id)
                new = [
                    {"length": length, "stretch": n, "num_targets": int(is_scored[i].sum())}
                    for i, n in enumerate(batch)
                ]
                for suffix, learn in modes.items():
                    _, nll_BL = reader.read(reader.start(tokens[:, 0], B), tokens[:, 1:], learn=learn, bar=bar)
                    nll = nll_BL[:, -settings.scored_tokens :]
                    for i, record in enumerate(new):
                        record[f"nll{suffix}"] = float(nll[i, is_scored[i]].sum(dtype=np.float64))
                records.add(new)
        text = TextBytes.of(config, subject.checkpoint)
        num_bytes = text.count_sequences(store, num_stretches, longest, settings.scored_tokens) if text else 0
        return records.finish(summarise(list(records.done.values()), settings, subject.step, num_bytes))

    def read(self, folder: Path) -> dict | None:
        """Reads the result, and its `records`; None where there is no result."""
        result = super().read(folder)
        return result and result | {"records": read_records(folder, self.name, result.get("about"))}

    def row(self, result: dict) -> list[dict]:
        """The list `lengths` of the result, one dict for each length."""
        return result["lengths"]

    def figure(self, runs: Sequence[Run]):
        """Draws loss against context length, and below it the difference from the shortest length or the first run."""
        import matplotlib

        with matplotlib.rc_context(STYLE):
            figure = make_figure(figsize=(9, 6.4))
            top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 2])
            lengths = set()
            with_result = [(run, color) for run, color in zip(runs, colors_of(runs)) if run.results[self.name]]
            first, others = with_result[0][0], with_result[1:]
            for run, color in with_result:
                result = run.results[self.name]
                entries = compared(result, first.results[self.name]) if others else result["lengths"]
                lengths |= _draw_run(top, bottom, run, entries, color)
            top.set(title="Held-out loss of the same last tokens", ylabel="NLL (nats per token)")
            top.set_xscale("log", base=2)
            add_legend(figure, top)
            against = f"{first.name} at the same length" if others else "the shortest length"
            bottom.set(title=f"Difference from {against}", ylabel="difference (nats)")
            bottom.set_xlabel("length of the context (tokens)")
            bottom.set_xticks(sorted(lengths), [f"{length}" for length in sorted(lengths)])
            bottom.minorticks_off()
            return figure


def summarise(records: list[dict], settings: Settings, step: int, num_bytes: int = 0) -> dict:
    """Computes the result: losses, differences from the shortest length, and standard errors, for each length.

    Args:
      records: one for each stretch and length; its `nll` is a sum over `num_targets` targets.
      settings: those of the evaluation.
      step: step of the checkpoint.
      num_bytes: bytes of the text of all targets; 0 = not known, and then the result has no bits per byte.
    """
    by_length = {length: [r for r in records if r["length"] == length] for length in settings.lengths}
    shortest = sorted(by_length[settings.lengths[0]], key=lambda r: r["stretch"])
    lengths = []
    for length, unsorted in by_length.items():
        same_length, entry = sorted(unsorted, key=lambda r: r["stretch"]), {"length": length}
        counts = np.array([r["num_targets"] for r in same_length], np.float64)
        for suffix in ("", "_without_learning"):
            if f"nll{suffix}" not in same_length[0]:
                continue
            # A sum that diverged is None, which NumPy takes as NaN.
            sums, base = (np.array([r[f"nll{suffix}"] for r in group], float) for group in (same_length, shortest))
            loss, difference = ratio(sums, counts), ratio(sums - base, counts)
            entry |= {f"loss{suffix}": loss[0], f"standard_error{suffix}": loss[1]}
            entry |= {f"difference{suffix}": difference[0], f"difference_standard_error{suffix}": difference[1]}
            if num_bytes:
                entry[f"bits_per_byte{suffix}"] = bits_per_byte(float(sums.sum()), num_bytes)
        lengths.append(entry)
    return {
        "step": step,
        "lengths": lengths,
        "scored_tokens": settings.scored_tokens,
        "num_stretches": len(shortest),
        "num_targets": sum(r["num_targets"] for r in shortest),
        **({"num_bytes": num_bytes} if num_bytes else {}),
    }


def compared(result: dict, first: dict) -> list[dict]:
    """The entries of a result, with the differences from the losses of another one, `first`, at the same length.

    A difference is None where `first` has no loss, and its standard error where not both read the same stretches.
    """
    reference = {entry["length"]: entry["loss"] for entry in first["lengths"]}
    is_same_text = bool(result["records"] and first["records"]) and _text(result) == _text(first)
    entries = []
    for entry in result["lengths"]:
        length, entry = entry["length"], dict(entry)
        ours, theirs = (_by_stretch(each["records"], length) if is_same_text else {} for each in (result, first))
        counts = np.array([record["num_targets"] for record in ours.values()], np.float64)
        for suffix in ("", "_without_learning"):
            if (loss := entry.get(f"loss{suffix}")) is None:
                continue
            other, error = reference.get(length), None
            if ours and ours.keys() == theirs.keys():
                nll, base = np.array([(ours[n][f"nll{suffix}"], theirs[n]["nll"]) for n in ours], float).T
                _, error = ratio(nll - base, counts)
            entry[f"difference{suffix}"] = None if other is None else loss - other
            entry[f"difference_standard_error{suffix}"] = error
        entries.append(entry)
    return entries


def _text(result: dict) -> tuple:
    """What tells whether stretches of the same number have the same scored tokens in two results."""
    about = result["about"]
    return about["data"], about.get("bos_id"), max(about["settings"]["lengths"]), result["scored_tokens"]


def _by_stretch(records: list[dict], length: int) -> dict[int, dict]:
    """The records of one length, by stretch."""
    return {record["stretch"]: record for record in records if record["length"] == length}


def ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float | None, float | None]:
    """The ratio sum(sums) / sum(counts), and its standard error over stretches (of a ratio estimator).

    Arguments are [stretches]. Results are None where there are too few: no count, or a single stretch.
    """
    n = len(sums)
    if not counts.sum():
        return None, None
    mean = sums.sum() / counts.sum()
    residuals = sums - mean * counts
    error = np.sqrt((residuals**2).sum() / (n * (n - 1))) / counts.mean() if n > 1 else None
    return float(mean), None if error is None else float(error)


def _draw_run(top, bottom, run: Run, entries: list[dict], color: str) -> set[int]:
    """Draws one run's losses in the upper panel and differences in the lower; returns its context lengths."""
    at = [entry["length"] for entry in entries]
    for suffix, style, label in (("", "-", run.name), ("_without_learning", "--", f"{run.name}, not learning")):
        if f"loss{suffix}" not in entries[0]:
            continue
        marks = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.6}
        marks |= {"color": color, "linestyle": style, "label": label}
        _draw(top, entries, f"loss{suffix}", f"standard_error{suffix}", marks)
        _draw(bottom, entries, f"difference{suffix}", f"difference_standard_error{suffix}", marks)
    trained = run.config.train.seq_len
    if min(at) <= trained <= max(at):
        for panel in (top, bottom):
            panel.axvline(trained, color="#bbbbbb", linewidth=1, zorder=1)
    return set(at)


def _draw(panel, entries: list[dict], field: str, error: str, marks: dict) -> None:
    """Draws a line with bars of one standard error; leaves out values and bars that are None."""
    points = [(e["length"], e[field], e[error]) for e in entries if e[field] is not None]
    if points:
        at, values, errors = zip(*points)
        panel.errorbar(at, values, yerr=[np.nan if e is None else e for e in errors], **marks)
