"""Retrieval of a single needle, by depth and length of the context.

Shapes: `B` sequences, `L` tokens of a prompt, `n` tokens that follow it, `V` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from tqdm import tqdm

from ttt_e2e.config import Config
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.fixed_batches import batches, fill_up
from ttt_e2e.evaluation.haystacks import TASKS, Haystacks, Prompt
from ttt_e2e.evaluation.records import Records, identify
from ttt_e2e.inference.generate import load_reader
from ttt_e2e.inference.prompts import find_tokenizer
from ttt_e2e.inference.reader import Reader, ReaderState
from ttt_e2e.inference.reading import read
from ttt_e2e.train.batches import open_store

NAME = "needle"
MARGIN = 4  # tokens generated beyond those of the answer, as its text may also be said in more of them
CELL = ("task", "length", "depth")
NLLS = ("nll", "nll_control", "nll_other_value")


@dataclass(frozen=True)
class Settings:
    """What is asked for. Raises `UserError` for what means nothing."""

    tasks: tuple[int, ...]
    lengths: tuple[int, ...] = ()  # of a prompt, in tokens; () = a quarter, half, one, two of train.seq_len that fit
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)  # percent
    samples: int = 4  # prompts for each task, length and depth

    def __post_init__(self):
        for name in ("tasks", "lengths", "depths"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            legal = ", ".join(f"{task} ({text})" for task, text in TASKS.items())
            raise UserError(f"needle is {_listed(self.tasks)}, but it takes some of {legal}")
        if self.lengths and self.lengths[0] < 1:
            raise UserError(f"needle_lengths is {_listed(self.lengths)}, but it takes integers of at least 1")
        if not self.depths or not 0 <= self.depths[0] <= self.depths[-1] <= 100:
            raise UserError(f"needle_depths is {_listed(self.depths)}, but it takes percentages, from 0 to 100")
        if self.samples < 1:
            raise UserError(f"needle_samples is {self.samples}, but it must be at least 1")


def check(config: Config, settings: Settings) -> tuple[Haystacks, tuple[int, ...]]:
    """What makes the prompts, and the lengths.

    Raises:
      UserError: there is no tokenizer, the held-out text does not fit the config, or a length is too short or too long.
    """
    store, tokenizer = open_store(config, config.data.eval_split), find_tokenizer(config)
    haystacks = Haystacks(tokenizer, store, config.data.bos_id or tokenizer.bos_id, config.model.vocab_size)
    if settings.lengths:
        _longest_answer(haystacks, settings, settings.lengths)
        return haystacks, settings.lengths
    lengths, reason = [], None
    for length in sorted({max(1, int(config.train.seq_len * share)) for share in (0.25, 0.5, 1, 2)}):
        try:
            _longest_answer(haystacks, settings, (length,))
            lengths.append(length)
        except UserError as error:
            reason = error
    if not lengths:
        raise UserError(f"{reason} (by default, lengths are a quarter, half, one and two of config.train.seq_len)")
    return haystacks, tuple(lengths)


def evaluate(config: Config, checkpoint, output, settings: Settings) -> dict:
    """Asks for needles, and for the same ones where they were left out.

    A model is asked twice: what it would say, greedily (`match` is whether that begins with the answer), and how likely
    the answer is to it. The latter shows whether anything was recalled, long before anything is said right: against the
    same prompt without the needle, it is the recall gain; against another value after the same prompt, the value gain,
    which needs the very value to be recalled, and not only what such values look like. Writes `needle.jsonl` and
    `needle.json`, which is returned, into the directory `output`.

    Raises:
      UserError: no such checkpoint, or it, the token store or the settings do not fit the config.
    """
    haystacks, lengths = check(config, settings)
    B = min(config.eval.batch_size, settings.samples)
    cells = list(product(settings.tasks, lengths, settings.depths))
    max_length = lengths[-1] + _longest_answer(haystacks, settings, lengths) + MARGIN
    reader = load_reader(config, checkpoint, max_length)
    about = identify(config, checkpoint, reader, haystacks.store, settings) | {"lengths": lengths}
    records = Records(output, NAME, about, key=(*CELL, "sample"))
    todo = [
        (cell, batch)
        for cell in cells
        for batch in batches(range(settings.samples), B)
        if not all(records.has(*cell, sample) for sample in batch)
    ]
    total = sum(2 * length for (_, length, _), _ in todo) * B
    with tqdm(total=total, desc="needle", unit="token", unit_scale=True, disable=not todo) as bar:
        for cell, batch in todo:
            bar.set_postfix_str("task {}, length {}, depth {}".format(*cell), refresh=False)
            prompts = [haystacks.prompt(*cell, sample) for sample in batch]
            found = ask(reader, haystacks, fill_up(prompts, B), bar)
            ids = [dict(zip(CELL, cell)) | {"sample": sample} for sample in batch]
            records.add([names | record for names, record in zip(ids, found)])
    return records.finish(summarise(list(records.done.values()), settings, lengths, about["step"]))


def ask(reader: Reader, haystacks: Haystacks, prompts: list[Prompt], bar: tqdm) -> list[dict]:
    """What a model says to prompts of one length, and how likely values are to it: the records of these prompts."""
    B = len(prompts)
    start = reader.start(haystacks.bos_id, B)
    with_needle, _ = read(reader, start, np.stack([prompt.tokens_L for prompt in prompts]), bar)
    control, _ = read(reader, start, np.stack([prompt.control_L for prompt in prompts]), bar)
    n = max(len(prompt.answer) for prompt in prompts) + MARGIN
    said_Bn, _ = _follow(reader, with_needle, n, lambda i, logits_BV: logits_BV.argmax(-1))
    answers, others = [prompt.answer for prompt in prompts], [prompt.other for prompt in prompts]
    nlls = {
        "nll": _mean_nll(reader, with_needle, answers),
        "nll_control": _mean_nll(reader, control, answers),
        "nll_other_value": _mean_nll(reader, with_needle, others),
    }
    found = []
    for i, prompt in enumerate(prompts):
        said = haystacks.tokenizer.decode(said_Bn[i])
        match = said.lstrip().startswith(prompt.value)
        record = {"answer": prompt.value, "said": said, "match": match, **{name: of[i] for name, of in nlls.items()}}
        found.append(record | {"num_answer_tokens": len(prompt.answer), "position": prompt.position})
    return found


def summarise(records: list[dict], settings: Settings, lengths: tuple[int, ...], step: int) -> dict:
    """The result, from a record for each prompt: means over the prompts of a task, and of each cell of its grid."""
    cells = []
    for cell in product(settings.tasks, lengths, settings.depths):
        found = [r for r in records if tuple(r[name] for name in CELL) == cell]
        cells.append(dict(zip(CELL, cell)) | _means(found))
    tasks = [{"task": task} | _means([r for r in records if r["task"] == task]) for task in settings.tasks]
    grid = {"lengths": list(lengths), "depths": list(settings.depths), "samples": settings.samples}
    return {"step": step, **grid, "tasks": tasks, "cells": cells}


def _means(records: list[dict]) -> dict:
    records = sorted(records, key=lambda r: tuple(r[name] for name in (*CELL, "sample")))
    match, *nlls = (np.array([r[name] for r in records], float) for name in ("match", *NLLS))
    means = {"exact_match": float(match.mean())} | {name: float(nll.mean()) for name, nll in zip(NLLS, nlls)}
    n = len(records)
    for name, without in (("recall_gain", nlls[1]), ("value_gain", nlls[2])):
        gain = without - nlls[0]
        means[name] = float(gain.mean())
        means[f"{name}_standard_error"] = float(gain.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return means


def _mean_nll(reader: Reader, state: ReaderState, answers: list[np.ndarray]) -> list[float]:
    """Mean NLL of the tokens of each answer after the state."""
    n = max(map(len, answers))
    # Beyond an answer, zeros: nothing that counts comes after them.
    answers_Bn = np.stack([np.pad(answer, (0, n - len(answer))) for answer in answers])
    _, nll_Bn = _follow(reader, state, n, lambda i, logits_BV: answers_Bn[:, i])
    return [float(nll_n[: len(answer)].mean(dtype=np.float64)) for nll_n, answer in zip(nll_Bn, answers)]


def _follow(reader: Reader, state: ReaderState, count: int, choose: Callable):
    """`count` tokens [B, count] that `choose(i, logits [B, V])` chooses one by one, and their NLL [B, count]."""
    tokens, nlls = [], []
    for i in range(count):
        state, token_B, nll_B = reader.step(state, lambda logits_BV, i=i: choose(i, logits_BV))
        tokens.append(token_B)
        nlls.append(nll_B)
    # Fetched at the end, so that the device never waits for the host.
    return np.stack([np.asarray(t) for t in tokens], axis=1), np.stack([np.asarray(x) for x in nlls], axis=1)


def _longest_answer(haystacks: Haystacks, settings: Settings, lengths: tuple[int, ...]) -> int:
    """Most tokens of a value of any prompt; raises `UserError` where one cannot be made."""
    places = product(settings.tasks, lengths, settings.depths, range(settings.samples))
    parts = (haystacks.parts(*place) for place in places)
    return max(max(len(p.answer), len(p.other)) for p in parts)


def _listed(values) -> str:
    return ",".join(map(str, values))
