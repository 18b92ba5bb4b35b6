"""Evaluates continuations of held-out documents by the NLL that a judge gives them.

The judge is another checkpoint, or the model itself.

Shapes: `B` sequences, `P` tokens of a prompt, `V` vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ttt_e2e.config import to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.base import Evaluation, Table, number, register
from ttt_e2e.evaluation.records import Records
from ttt_e2e.evaluation.subject import Subject
from ttt_e2e.inference.settings import Sampling
from ttt_e2e.progress import progress_bar
from ttt_e2e.settings import setting

if TYPE_CHECKING:
    from ttt_e2e.data.store import TokenStore
    from ttt_e2e.data.tokenizers import Tokenizer
    from ttt_e2e.inference.reader import Reader

CHUNK = 2**20  # tokens of the split that are read at a time when looking for documents


@dataclass(frozen=True)
class Settings:
    """Settings of the evaluation, made from its flags. Raises `UserError` for an illegal value."""

    prompt_tokens: int = setting(
        "generation_prompt_tokens", "First tokens of a document to continue; 0 = half the trained length.", 0
    )
    tokens: int = setting("generation_tokens", "Tokens to generate, at most.", 128)
    samples: int = setting("generation_samples", "Documents to continue, at most.", 16)
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = setting("seed", "Of what is drawn.", 0)
    judge: str = setting(
        "judge", "Run directory of the judge, or a checkpoint in one; default: the model itself.", "", is_path=True
    )

    def __post_init__(self):
        for name, value, least in (
            ("generation_prompt_tokens", self.prompt_tokens, 0),
            ("generation_tokens", self.tokens, 1),
            ("generation_samples", self.samples, 1),
        ):
            if value < least:
                raise UserError(f"{name} is {value}, but it must be at least {least}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}, but it must be at least 0 and below 2^32")


class Plan(NamedTuple):
    """The documents to continue, and the judge."""

    prompt_tokens: int  # tokens of a document that are the prompt
    documents: list[int]  # index of the first token of each document in the held-out split
    judge: Subject


@register
class Generation(Evaluation):
    """Continues the beginnings of held-out documents; the judge scores the continuations, and the true ones too.

    All continuations are generated before the first is judged, so that one model at a time is in memory.
    """

    name = "generation"
    help = "Instead: continuations of held-out documents, scored by a judge."
    Settings = Settings
    fields = ("judge", "num_samples", "prompt_tokens", "generated", "reference")
    note = (
        "Continuations of held-out documents: NLL of what was generated under the model itself (own) and under the "
        "judge, and of what truly follows (true) under the judge, per token and per byte of text. Tokens of different "
        "tokenizers cannot be compared, bytes can."
    )

    def check(self, subject: Subject, settings: Settings) -> Plan:
        """Chooses the documents and finds the judge.

        Raises:
          UserError: there is no tokenizer, no document is long enough, or the judge cannot be read.
        """
        store, bos_id = subject.store, subject.bos_id
        judge = find_judge(settings.judge) if settings.judge else subject
        prompt_tokens = settings.prompt_tokens or max(1, subject.config.train.seq_len // 2)
        length = prompt_tokens + settings.tokens
        documents, longest = find_documents(store, bos_id, length, settings.samples)
        if not documents:
            raise UserError(
                f"generation_prompt_tokens + generation_tokens is {length}, but the longest document of "
                f"{store.path}/{store.split} has {longest} tokens"
            )
        return Plan(prompt_tokens, documents, judge)

    def evaluate(self, subject: Subject, output, settings: Settings) -> dict:
        """Generates and judges the continuations that have no record yet."""
        plan = self.check(subject, settings)
        judge, count = plan.judge, len(plan.documents)
        reader = subject.reader(plan.prompt_tokens + settings.tokens)
        about = subject.about(reader, settings)
        about["judge"] = {
            "step": judge.step,
            "model": to_dict(judge.config)["model"],
            "inner": asdict(judge.config.inner),
        }
        records = Records(output, self.name, about, key=("stage", "sample"))
        _generate_all(reader, subject, plan, settings, records)
        generated = [records.done["generated", sample] for sample in range(count)]
        texts = [_in_tokens_of(judge, subject, plan, settings, record) for record in generated]
        if judge is not subject:
            del reader
            longest = max(len(prompt) + max(map(len, pair)) for prompt, *pair in texts)
            reader = judge.reader(longest)
        _judge_all(reader, judge.bos_id, texts, records, subject.config.eval.batch_size)
        judged = [records.done["judged", sample] for sample in range(count)]
        summary = {"step": subject.step, "judge": settings.judge, "judge_step": judge.step}
        return records.finish(summary | summarise(generated, judged, plan.prompt_tokens))

    def row(self, result: dict) -> dict:
        """The whole result, without `about`."""
        return {name: value for name, value in result.items() if name != "about"}

    def table(self, rows: dict[str, dict]) -> Table:
        """Makes the report's table: NLL of generated and of true continuations, per token and per byte, of each run."""
        header = ["run", "judge", "samples", "prompt", "tokens", "own", "judge", "judge, bytes", "true", "true, bytes"]
        lines = []
        for run, row in rows.items():
            generated, reference = row["generated"], row["reference"]
            figures = [row["num_samples"], row["prompt_tokens"], generated["num_tokens"]]
            figures.append(generated["own_nll_per_token"])
            for scores in (generated, reference):
                figures += [scores["judge_nll_per_token"], scores["judge_nll_per_byte"]]
            lines.append([run, row["judge"] or "itself", *map(number, figures)])
        return Table(header, lines, 2, self.note)


def find_judge(path: str) -> Subject:
    """The model of a run directory, or of a checkpoint in one. Raises `UserError` where it cannot be read."""
    try:
        return Subject.of(path)
    except UserError as error:
        raise UserError(f"judge {path}: {error}") from None


def find_documents(store: TokenStore, bos_id: int, length: int, count: int) -> tuple[list[int], int]:
    """Finds the first `count` documents of at least `length` tokens.

    Returns the index in the split of the first token of each, after its BOS, and the number of tokens of the longest
    document up to there.
    """
    begins, longest, begin = [], 0, 0
    for start in range(0, store.num_tokens, CHUNK):
        chunk = store.stretch(start, min(start + CHUNK, store.num_tokens))
        ends = [start + int(at) for at in np.flatnonzero(chunk == bos_id)]
        if start + CHUNK >= store.num_tokens:
            ends.append(store.num_tokens)
        for end in ends:
            # Tokens before the first BOS, if any, are the end of a document and not a whole one.
            if begin:
                longest = max(longest, end - begin)
            if begin and end - begin >= length:
                begins.append(begin)
                if len(begins) == count:
                    return begins, longest
            begin = end + 1
    return begins, longest


def summarise(generated: list[dict], judged: list[dict], prompt_tokens: int) -> dict:
    """Computes the result: mean NLL per token and per byte, over all continuations of all documents."""

    def rates(name: str) -> dict:
        nll, num_tokens = _total(judged, f"{name}_nll"), sum(r[f"{name}_num_tokens"] for r in judged)
        num_bytes = sum(r[f"{name}_num_bytes"] for r in generated)
        per_token, per_byte = (nll / count if count else None for count in (num_tokens, num_bytes))
        counts = {"num_bytes": num_bytes, "judge_num_tokens": num_tokens}
        return counts | {"judge_nll_per_token": per_token, "judge_nll_per_byte": per_byte}

    own_tokens = sum(len(r["tokens"]) for r in generated)
    own = _total(generated, "own_nll") / own_tokens if own_tokens else None
    return {
        "num_samples": len(generated),
        "prompt_tokens": prompt_tokens,
        "generated": {"num_tokens": own_tokens, "own_nll_per_token": own, **rates("generated")},
        "reference": rates("reference"),
        "ended_by_bos": sum(r["ended_by"] == "bos" for r in generated),
    }


def _total(records: list[dict], field: str) -> float:
    """Sum of a field over records; NaN where one is None, that is, diverged."""
    return sum(math.nan if record[field] is None else record[field] for record in records)


# ------------------------------------------------------------------------------------------------------- two stages


def _generate_all(reader: Reader, subject: Subject, plan: Plan, settings: Settings, records: Records) -> None:
    """Generates continuations: adds a record of the stage `generated` for each document that has none yet."""
    config, tokenizer, bos_id = subject.config, subject.tokenizer, subject.bos_id
    B, P = min(config.eval.batch_size, len(plan.documents)), plan.prompt_tokens
    todo = records.unfinished(("generated",), len(plan.documents), B)
    total = len(todo) * B * (P + settings.tokens)
    with progress_bar(total=total, desc="generate", unit="token", unit_scale=True, disable=not todo) as bar:
        for batch, filled in todo:
            begins = [plan.documents[sample] for sample in filled]
            length, vocab_size = P + settings.tokens, config.model.vocab_size
            documents = np.stack([subject.store.stretch(at, at + length, vocab_size) for at in begins])
            tokens, nlls = _continue(reader, documents[:, :P], filled, settings, bos_id, bar)
            finished = []
            for i, sample in enumerate(batch):
                count, ended_by = _end_of(tokens[i], nlls[i], bos_id)
                prompt, reference = documents[i, :P], documents[i, P:]
                record = {"stage": "generated", "sample": sample, "start": begins[i]}
                record["prompt"] = tokenizer.decode(prompt)
                for name, ids in (("generated", tokens[i, :count]), ("reference", reference)):
                    record[name] = _text_after(tokenizer, prompt, ids)
                    record[f"{name}_num_bytes"] = len(record[name].encode("utf-8"))
                record |= {"tokens": tokens[i, :count].tolist(), "ended_by": ended_by}
                own_nll = math.nan if ended_by == "diverged" else float(nlls[i, :count].sum(dtype=np.float64))
                finished.append(record | {"own_nll": own_nll})
            records.add(finished)


def _continue(reader: Reader, prompts_BP, samples: list[int], settings: Settings, bos_id: int, bar):
    """Samples continuations of prompts [B, P]: tokens [B, n], and their NLL [B, n] in nats.

    n is `settings.tokens`, or less where all sequences have reached BOS, or diverged, before.
    """
    import jax

    from ttt_e2e.inference.sampling import choose

    B = len(samples)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(settings.seed), np.array(samples))
    seen_BV = np.zeros((B, reader.config.model.vocab_size), bool)
    state, _ = reader.read(reader.start(bos_id, B), prompts_BP, bar=bar)
    tokens, nlls, ended_B = [], [], np.zeros(B, bool)
    for index in range(settings.tokens):

        def draw(logits_BV, index=index):
            return choose(keys_B, index, logits_BV, seen_BV, settings.sampling)

        state, token_B, nll_B = reader.step(state, draw)
        tokens.append(np.asarray(token_B))
        nlls.append(np.asarray(nll_B))
        ended_B |= (tokens[-1] == bos_id) | ~np.isfinite(nlls[-1])
        bar.update(B)
        if ended_B.all():
            break
    return np.stack(tokens, axis=1), np.stack(nlls, axis=1)


def _end_of(tokens_n, nll_n, bos_id: int) -> tuple[int, str]:
    """Number of tokens of a continuation, and what ended it: "bos", "length", or "diverged": an NLL is not finite."""
    ends = np.flatnonzero((tokens_n == bos_id) | ~np.isfinite(nll_n))
    if not len(ends):
        return len(tokens_n), "length"
    return int(ends[0]), "bos" if np.isfinite(nll_n[ends[0]]) else "diverged"


def _judge_all(reader: Reader, bos_id: int, texts: list, records: Records, batch_size: int) -> None:
    """Scores continuations: adds a record of the stage `judged` for each document that has none yet.

    texts: token ids (prompt, continuation, true continuation) of each document, in the judge's tokens.
    """
    B = min(batch_size, len(texts))
    todo = records.unfinished(("judged",), len(texts), B)
    names = ("generated", "reference")
    total = sum(B * max(len(texts[n][0]) + len(texts[n][k]) for n in batch) for batch, _ in todo for k in (1, 2))
    with progress_bar(total=total, desc="judge", unit="token", unit_scale=True, disable=not todo) as bar:
        for batch, filled in todo:
            finished = [{"stage": "judged", "sample": sample} for sample in batch]
            for which, name in enumerate(names, start=1):
                rows = [(texts[sample][0], texts[sample][which]) for sample in filled]
                for record, (_, continuation), nll in zip(finished, rows, _score(reader, bos_id, rows, bar)):
                    record |= {f"{name}_nll": nll, f"{name}_num_tokens": len(continuation)}
            records.add(finished)


def _score(reader: Reader, bos_id: int, rows: list[tuple[np.ndarray, np.ndarray]], bar) -> list[float]:
    """NLL, in nats and summed over its tokens, of each continuation in rows of (prompt, continuation)."""
    texts = [np.concatenate(row) for row in rows]
    longest = max(map(len, texts))
    # Padded with zeros at the end, where by causality they change no NLL that is used.
    filled = np.stack([np.pad(text, (0, longest - len(text))) for text in texts])
    _, nll_BT = reader.read(reader.start(bos_id, len(rows)), filled, bar=bar)
    spans = [(len(prompt), len(prompt) + len(continuation)) for prompt, continuation in rows]
    return [float(nll[start:stop].sum(dtype=np.float64)) for nll, (start, stop) in zip(nll_BT, spans)]


def _in_tokens_of(judge: Subject, subject: Subject, plan: Plan, settings: Settings, record: dict) -> list[np.ndarray]:
    """Token ids of prompt, continuation and true continuation for the judge.

    A judge with another tokenizer gets the same text, encoded by its own.
    """
    if judge.tokenizer.fingerprint != subject.tokenizer.fingerprint:
        return [judge.encode(record[name]) for name in ("prompt", "generated", "reference")]
    start, P = record["start"], plan.prompt_tokens
    document = subject.store.stretch(start, start + P + settings.tokens)
    return [document[:P], np.array(record["tokens"], np.int32), document[P:]]


def _text_after(tokenizer: Tokenizer, prompt, ids) -> str:
    """Decodes tokens that follow a prompt, in its context: some tokenizers drop a space at the beginning of a text."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    # A prompt that ends within a character is no prefix of the whole: it decodes to U+FFFD at its end.
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)
