"""Evaluates the held-out loss of every token, with and without learning while reading. It is the default evaluation.

Shapes: `B` sequences, `T` positions of a sequence.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath

from ttt_e2e.config import Config
from ttt_e2e.errors import PreemptedError, UserError
from ttt_e2e.evaluation.base import Evaluation, read_result, register
from ttt_e2e.evaluation.plots import colors_of
from ttt_e2e.evaluation.subject import Subject, warn_of_other_text
from ttt_e2e.evaluation.text_bytes import TextBytes, bits_per_byte
from ttt_e2e.figures import STYLE, add_legend, make_figure
from ttt_e2e.outputs import writing
from ttt_e2e.paths import in_bucket
from ttt_e2e.runs.files import replace_text, replacing
from ttt_e2e.strict_json import to_json

if TYPE_CHECKING:
    from ttt_e2e.data.store import TokenStore
    from ttt_e2e.evaluation.runs import Run

NAME = "token_losses"
MAX_BINS = 64  # most points of a curve


class HeldOut(NamedTuple):
    """The results of `evaluate` that a report reads; losses in nats per token."""

    metrics: dict  # contents of metrics.json
    nll_T: np.ndarray  # mean over sequences, BOS targets included
    nll_without_learning_T: np.ndarray | None  # None = the model has no fast weights


@register
class TokenLosses(Evaluation):
    """Evaluates held-out sequences by the program of training, on all devices of all processes.

    Its results are in the first table of a report.
    """

    name = NAME
    is_default = True
    in_one_process = False
    figure_name = "loss_by_position"
    caption = (
        "Held-out loss by position in context: mean over the sequences, every target counted. Solid: as trained; "
        "dashed: the same model not learning. Grey lines: the window, from which on a block's attention misses the "
        "beginning."
    )

    def evaluate(self, subject: Subject, output, settings) -> dict:
        """Calls the function `evaluate`, which writes the results and returns the metrics."""
        return evaluate(subject.config, subject.checkpoint, output)

    def printed(self, result: dict) -> dict:
        """All metrics, at the top level of what the command prints."""
        return result

    def read(self, folder: epath.Path) -> HeldOut | None:
        """Reads `metrics.json`, and the NLL arrays as means [T] over sequences; None where there is no result."""
        metrics = read_result(folder / "metrics.json", ("loss", "token_loss", "seq_len", "step"))
        if metrics is None:
            return None
        nll_T, without_T = _read_nll(folder / "token_nll.npy", metrics["seq_len"]), None
        if "loss_without_learning" in metrics:
            without_T = _read_nll(folder / "token_nll_without_learning.npy", metrics["seq_len"])
        return HeldOut(metrics, nll_T, without_T)

    def figure(self, runs: Sequence[Run]):
        """Draws held-out NLL against the position in context, and below it the difference from the first curve."""
        import matplotlib

        size, longest = _bin_size(runs), 0
        curves = []  # (label, color, linestyle, NLL of each bin)
        for run, color in zip(runs, colors_of(runs)):
            if held_out := run.results[NAME]:
                longest = max(longest, len(held_out.nll_T))
                curves.append((run.name, color, "-", _binned(held_out.nll_T, size)))
                if (without_T := held_out.nll_without_learning_T) is not None:
                    curves.append((f"{run.name}, not learning", color, "--", _binned(without_T, size)))
        reference_label, *_, reference = curves[0]

        with matplotlib.rc_context(STYLE):
            figure = make_figure(figsize=(9, 6.4 if len(curves) > 1 else 4.2))
            if len(curves) > 1:
                top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 2])
            else:
                top, bottom = figure.subplots(), None
            for label, color, style, nll in curves:
                positions = (np.arange(len(nll)) + 0.5) * size
                top.plot(positions, nll, style, color=color, linewidth=1.6, label=label)
                shared = min(len(nll), len(reference))
                if bottom is not None:
                    difference = nll[:shared] - reference[:shared]
                    bottom.plot(positions[:shared], difference, style, color=color, linewidth=1.6)
            _draw_windows(runs, [top, bottom] if bottom else [top])
            top.set(title="Held-out loss by position in context", ylabel="NLL (nats per token)")
            add_legend(figure, top)
            if bottom is not None:
                bottom.set(title=f"Difference from {reference_label}", ylabel="difference (nats)")
            last = bottom or top
            last.set(xlabel=f"position in context (tokens, means over {size})", xlim=(0, longest))
            last.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(max(1, longest // 8)))
            return figure


def evaluate(config: Config, checkpoint, output) -> dict:
    """Evaluates a checkpoint on `data.eval_split`, and writes the results into the directory `output`.

    Writes `token_nll.npy` (NLL, float32 [sequences, seq_len], nats, unmasked, each token scored with the fast weights
    before its mini-batch's inner step) and `metrics.json`, whose contents are returned. For a model with fast weights
    also writes `token_nll_without_learning.npy`, the same at inner learning rate 0.

    Raises:
      UserError: there is no such checkpoint, or it or the token store does not fit the config.
      PreemptedError, KeyboardInterrupt: a signal, or Ctrl-C, asked to stop; nothing is written.
    """
    from ttt_e2e.cluster.signals import watch_for_preemption

    with watch_for_preemption() as preemption:
        try:
            return _evaluate(config, checkpoint, output, stop=preemption.poll)
        except PreemptedError:
            raise preemption.stopped("in an evaluation, of which nothing is written") from None


def _evaluate(config: Config, checkpoint, output, stop) -> dict:
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from ttt_e2e.checkpoints.params import load_params
    from ttt_e2e.checkpoints.progress import load_progress
    from ttt_e2e.checkpoints.steps import find_step
    from ttt_e2e.cluster.mesh import make_mesh, shardings, with_shardings
    from ttt_e2e.model import abstract_model
    from ttt_e2e.train.batches import check_batch, held_out_loss, open_held_out
    from ttt_e2e.train.steps import make_eval_step

    mesh = make_mesh(config.mesh)
    check_batch("config.eval.batch_size", config.eval.batch_size, mesh)
    store = open_held_out(config, mesh, checkpoint)
    warn_of_other_text(config, checkpoint)
    step_directory = find_step(checkpoint)
    _, abstract = abstract_model(config.model)
    placed = shardings(abstract, mesh, config.model)
    params = load_params(step_directory, with_shardings(abstract, placed))
    eval_step = make_eval_step(config, mesh, placed)

    whole = jax.jit(lambda nll_BT: nll_BT, out_shardings=NamedSharding(mesh, P()))
    nlls: dict[str, list[np.ndarray]] = {}  # by file name, NLL [B, T] of each batch

    def read(inner_rate, desc, name):
        def take(nll_BT, num_sequences):
            nlls.setdefault(name, []).append(np.asarray(whole(nll_BT))[:num_sequences])

        def evaluate(tokens, num_sequences):
            return eval_step(params, tokens, inner_rate, num_sequences)

        return held_out_loss(evaluate, store, config, mesh, desc, stop, take)

    learning = read(config.inner.learning_rate, "evaluate", "token_nll")
    metrics = {
        "step": load_progress(step_directory)["step"],
        "loss": learning.loss,
        "token_loss": learning.token_loss,
        "num_tokens": learning.num_tokens,
        "num_sequences": learning.num_sequences,
        "seq_len": config.train.seq_len,
    }
    if config.model.num_fast_blocks:
        static = read(0.0, "evaluate without learning", "token_nll_without_learning")
        metrics |= {"loss_without_learning": static.loss, "token_loss_without_learning": static.token_loss}
    metrics |= _bits_per_byte(config, checkpoint, store, metrics)
    arrays = {name: np.concatenate(parts) for name, parts in nlls.items()}
    metrics |= _divergence(arrays)
    if jax.process_index() == 0:
        _write(epath.Path(output), metrics, arrays)
    return metrics


def _divergence(arrays: dict[str, np.ndarray]) -> dict:
    """The metric `diverged`, of NLL [sequences, T] by name: where the first that is not finite is; {} if all are."""
    for name, nll in arrays.items():
        if len(places := np.argwhere(~np.isfinite(nll))):
            sequence, position = map(int, places[0])
            where = f"position {position} of held-out sequence {sequence}, both counted from 0"
            return {"diverged": f"{name} is {nll[sequence, position]} at {where}"}
    return {}


def _bits_per_byte(config: Config, checkpoint, store: TokenStore, metrics: dict) -> dict:
    """Counts the bytes of the targets' text, and computes the loss in bits for each of them.

    Returns the metrics `tokenizer` (its fingerprint), `num_bytes` and `bits_per_byte`, with learning and without; {}
    where the tokenizer is not known.
    """
    text = TextBytes.of(config, checkpoint)
    num_bytes = text.count_sequences(store, metrics["num_sequences"], metrics["seq_len"]) if text else 0
    if not num_bytes:
        return {}
    figures = {"tokenizer": text.tokenizer, "num_bytes": num_bytes}
    for suffix in ("", "_without_learning"):
        if (loss := metrics.get(f"token_loss{suffix}")) is not None:
            figures[f"bits_per_byte{suffix}"] = bits_per_byte(loss * metrics["num_tokens"], num_bytes)
    return figures


def _write(output: epath.Path, metrics: dict, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays, then `metrics.json`, whose presence says that the arrays are whole.

    Those of before stay where the new ones cannot be written; then nothing is left of another model's.
    """
    with writing(output), ExitStack() as stack:
        output.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            with stack.enter_context(replacing(output / f"{name}.npy")).open("wb") as file:
                np.save(file, array.astype(np.float32))
        for name in ("metrics.json", "token_nll.npy", "token_nll_without_learning.npy"):  # of another model
            (output / name).unlink(missing_ok=True)
    replace_text(output / "metrics.json", to_json(metrics, indent=2) + "\n")


def _read_nll(path: epath.Path, seq_len: int) -> np.ndarray:
    """Reads NLL [sequences, T] from a file and averages it over sequences to [T], BOS targets included."""
    try:
        if in_bucket(path):
            nll = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        else:
            nll = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: evaluate the run again") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a readable .npy array: {error}") from None
    if nll.ndim != 2 or nll.shape[0] == 0 or nll.shape[1] != seq_len or nll.dtype.kind != "f":
        raise UserError(f"{path} holds {nll.dtype} {list(nll.shape)}, but it takes floats [sequences, {seq_len}]")
    return nll.mean(axis=0, dtype=np.float64)


def _draw_windows(runs: Sequence[Run], panels: list) -> None:
    """Draws a line at each window shorter than the context: from there on attention does not reach its beginning."""
    evaluated = [(run.config.model.windows, len(run.results[NAME].nll_T)) for run in runs if run.results[NAME]]
    for window in sorted({k for windows, length in evaluated for k in windows if 0 < k < length}):
        for panel in panels:
            panel.axvline(window, color="#bbbbbb", linewidth=1, zorder=1)
        at_top = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        panels[0].annotate(
            f"window {window}", (window, 1), xytext=(4, -2), va="top", color="#777777", fontsize=9, **at_top
        )


def _bin_size(runs: Sequence[Run]) -> int:
    """Number of positions in a bin: a mini-batch, doubled until the longest curve has at most `MAX_BINS` bins."""
    lengths = [len(run.results[NAME].nll_T) for run in runs if run.results[NAME]]
    mini_batches = [run.config.inner.mini_batch_size for run in runs if run.config.model.num_fast_blocks]
    size = min(mini_batches, default=max(1, min(lengths) // 32))
    while max(lengths) > MAX_BINS * size:
        size *= 2
    return size


def _binned(nll_T: np.ndarray, size: int) -> np.ndarray:
    """Means of NLL [T] over bins of `size` positions, [T / size], rounded up."""
    starts = np.arange(0, len(nll_T), size)
    return np.add.reduceat(nll_T, starts) / np.diff(np.append(starts, len(nll_T)))
