"""Continuations of held-out documents, scored by a judge: any checkpoint, the model itself by default.

Shapes: `B` sequences, `P` tokens of a prompt, `V` vocabulary.
"""

from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ttt_e2e.checkpoints.params import check_params
from ttt_e2e.checkpoints.progress import load_progress
from ttt_e2e.checkpoints.steps import find_step
from ttt_e2e.config import Config
from ttt_e2e.data.store import TokenStore
from ttt_e2e.data.tokenizers import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.fixed_batches import batches, fill_up
from ttt_e2e.evaluation.records import Records, identify
from ttt_e2e.inference.generate import load_reader
from ttt_e2e.inference.prompts import encode, find_tokenizer
from ttt_e2e.inference.reader import Reader
from ttt_e2e.inference.reading import read
from ttt_e2e.inference.sampling import Sampling, choose
from ttt_e2e.model import abstract_model
from ttt_e2e.runs.directory import find_run, load_config
from ttt_e2e.train.batches import open_store

NAME = "generation"
CHUNK = 2**20  # tokens of the split that are looked through for documents at a time


@dataclass(frozen=True)
class Settings:
    """What is asked for. Raises `UserError` for what means nothing."""

    prompt_tokens: int = 0  # first tokens of a document; 0 = half of train.seq_len
    tokens: int = 128  # to generate; fewer where a document is ended
    samples: int = 16  # documents, one continuation each; at most
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    judge: str = ""  # run directory, or a checkpoint in one; "" = the model itself

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


class Judge(NamedTuple):
    """Whose opinion is asked: a model by its config, checkpoint and tokenizer."""

    config: Config
    checkpoint: str
    tokenizer: Tokenizer

    @property
    def bos_id(self) -> int:
        """What a text begins with."""
        return self.config.data.bos_id or self.tokenizer.bos_id


class Plan(NamedTuple):
    """What is read and by whom."""

    store: TokenStore
    tokenizer: Tokenizer
    prompt_tokens: int
    num_tokens: int  # that follow a prompt, at most
    documents: list[int]  # where they begin in the store
    judge: Judge | None  # None = the model itself


def check(config: Config, settings: Settings) -> Plan:
    """What is read and by whom.

    Raises:
      UserError: there is no tokenizer, no document is long enough, or the judge cannot be read.
    """
    store, tokenizer = open_store(config, config.data.eval_split), find_tokenizer(config)
    judge = find_judge(settings.judge) if settings.judge else None
    prompt_tokens = settings.prompt_tokens or max(1, config.train.seq_len // 2)
    bos_id = config.data.bos_id or tokenizer.bos_id
    length = prompt_tokens + settings.tokens
    documents, longest = find_documents(store, bos_id, length, settings.samples)
    if not documents:
        raise UserError(
            f"generation_prompt_tokens + generation_tokens is {length}, but the longest document of "
            f"{store.path}/{store.split} has {longest} tokens"
        )
    return Plan(store, tokenizer, prompt_tokens, settings.tokens, documents, judge)


def find_judge(path: str) -> Judge:
    """The model of a run directory, or of a checkpoint in one. Raises `UserError` where it cannot be read."""
    try:
        config, step_directory = load_config(find_run(path)), find_step(path)
        check_params(step_directory, abstract_model(config.model)[1])
        load_progress(step_directory)
        return Judge(config, str(step_directory), find_tokenizer(config))
    except UserError as error:
        raise UserError(f"judge {path}: {error}") from None


def find_documents(store: TokenStore, bos_id: int, length: int, count: int) -> tuple[list[int], int]:
    """Where the first `count` documents of at least `length` tokens begin, after their BOS.

    The second result is the number of tokens of the longest document that was seen on the way.
    """
    found, longest, begin = [], 0, 0
    for start in range(0, store.num_tokens, CHUNK):
        chunk = store.stretch(start, min(start + CHUNK, store.num_tokens))
        ends = [start + int(at) for at in np.flatnonzero(chunk == bos_id)]
        if start + CHUNK >= store.num_tokens:
            ends.append(store.num_tokens)
        for end in ends:
            # What comes before the first BOS is the rest of some document, if anything.
            if begin:
                longest = max(longest, end - begin)
            if begin and end - begin >= length:
                found.append(begin)
                if len(found) == count:
                    return found, longest
            begin = end + 1
    return found, longest


def evaluate(config: Config, checkpoint, output, settings: Settings) -> dict:
    """Continues the beginnings of held-out documents, and has the continuations scored, and the true ones too.

    All are generated first, then all are judged, so that one model is held at a time. Writes `generation.jsonl` and
    `generation.json`, which is returned, into the directory `output`.

    Raises:
      UserError: no such checkpoint, or it, the token store or the settings do not fit the config, or an unreadable
        judge.
    """
    plan = check(config, settings)
    reader = load_reader(config, checkpoint, plan.prompt_tokens + settings.tokens)
    about = identify(config, checkpoint, reader, plan.store, settings)
    own = Judge(config, str(find_step(checkpoint)), plan.tokenizer)
    judge = plan.judge or own
    about["judge"] = {"step": load_progress(judge.checkpoint)["step"], "model": asdict(judge.config.model)}
    about["judge"]["inner"] = asdict(judge.config.inner)
    records = Records(output, NAME, about, key=("stage", "sample"))
    _generate_all(reader, config, plan, settings, records)
    generated = [records.done["generated", sample] for sample in range(len(plan.documents))]
    texts = [_in_tokens_of(judge, plan, record) for record in generated]
    if plan.judge:
        del reader
        longest = max(len(prompt) + max(map(len, pair)) for prompt, *pair in texts)
        reader = load_reader(judge.config, judge.checkpoint, longest)
    _judge_all(reader, judge, texts, records, config.eval.batch_size)
    judged = [records.done["judged", sample] for sample in range(len(plan.documents))]
    summary = {"step": about["step"], "judge": settings.judge, "judge_step": about["judge"]["step"]}
    return records.finish(summary | summarise(generated, judged, plan.prompt_tokens))


def summarise(generated: list[dict], judged: list[dict], prompt_tokens: int) -> dict:
    """Means over all tokens, and over all bytes, of all continuations."""

    def rates(name: str) -> dict:
        nll, num_tokens = (sum(r[f"{name}_{of}"] for r in judged) for of in ("nll", "num_tokens"))
        num_bytes = sum(r[f"{name}_num_bytes"] for r in generated)
        per_token, per_byte = (nll / count if count else None for count in (num_tokens, num_bytes))
        counts = {"num_bytes": num_bytes, "judge_num_tokens": num_tokens}
        return counts | {"judge_nll_per_token": per_token, "judge_nll_per_byte": per_byte}

    own_tokens = sum(len(r["tokens"]) for r in generated)
    own = sum(r["own_nll"] for r in generated) / own_tokens if own_tokens else None
    return {
        "num_samples": len(generated),
        "prompt_tokens": prompt_tokens,
        "generated": {"num_tokens": own_tokens, "own_nll_per_token": own, **rates("generated")},
        "reference": rates("reference"),
        "ended_by_bos": sum(r["ended_by"] == "bos" for r in generated),
    }


# ------------------------------------------------------------------------------------------------------- two stages


def _generate_all(reader: Reader, config: Config, plan: Plan, settings: Settings, records: Records) -> None:
    """Adds a record of the stage `generated` for each document that has none yet."""
    B, P = min(config.eval.batch_size, len(plan.documents)), plan.prompt_tokens
    samples = batches(range(len(plan.documents)), B)
    todo = [batch for batch in samples if not all(records.has("generated", sample) for sample in batch)]
    bos_id, decode = config.data.bos_id or plan.tokenizer.bos_id, plan.tokenizer.decode
    total = len(todo) * B * (P + settings.tokens)
    with tqdm(total=total, desc="generate", unit="token", unit_scale=True, disable=not todo) as bar:
        for batch in todo:
            rows = fill_up(batch, B)
            begins = [plan.documents[sample] for sample in rows]
            documents = [plan.store.stretch(at, at + P + settings.tokens, config.model.vocab_size) for at in begins]
            documents = np.stack(documents)
            tokens, nlls = _continue(reader, documents[:, :P], rows, settings, bos_id, bar)
            found = []
            for i, sample in enumerate(batch):
                ended = np.flatnonzero(tokens[i] == bos_id)
                count = int(ended[0]) if len(ended) else len(tokens[i])
                prompt, reference = documents[i, :P], documents[i, P:]
                record = {"stage": "generated", "sample": sample, "start": begins[i], "prompt": decode(prompt)}
                for name, ids in (("generated", tokens[i, :count]), ("reference", reference)):
                    record[name] = _text_after(plan.tokenizer, prompt, ids)
                    record[f"{name}_num_bytes"] = len(record[name].encode("utf-8"))
                record |= {"tokens": tokens[i, :count].tolist(), "ended_by": "bos" if len(ended) else "length"}
                found.append(record | {"own_nll": float(nlls[i, :count].sum(dtype=np.float64))})
            records.add(found)


def _continue(reader: Reader, prompts_BP, samples: list[int], settings: Settings, bos_id: int, bar: tqdm):
    """Tokens that follow the prompts, and their NLL [B, n]; stops early where all rows have BOS."""
    B = len(samples)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(settings.seed), np.array(samples))
    seen_BV = np.zeros((B, reader.config.model.vocab_size), bool)
    state, _ = read(reader, reader.start(bos_id, B), prompts_BP, bar)
    tokens, nlls, ended_B = [], [], np.zeros(B, bool)
    for index in range(settings.tokens):

        def draw(logits_BV, index=index):
            return choose(keys_B, index, logits_BV, seen_BV, settings.sampling)

        state, token_B, nll_B = reader.step(state, draw)
        tokens.append(np.asarray(token_B))
        nlls.append(np.asarray(nll_B))
        ended_B |= tokens[-1] == bos_id
        bar.update(B)
        if ended_B.all():
            break
    return np.stack(tokens, axis=1), np.stack(nlls, axis=1)


def _judge_all(reader: Reader, judge: Judge, texts: list, records: Records, batch_size: int) -> None:
    """Adds a record of the stage `judged` for each (prompt, continuation, true continuation) that has none yet."""
    B = min(batch_size, len(texts))
    todo = [
        batch for batch in batches(range(len(texts)), B) if not all(records.has("judged", sample) for sample in batch)
    ]
    names = ("generated", "reference")
    total = sum(B * max(len(texts[n][0]) + len(texts[n][k]) for n in batch) for batch in todo for k in (1, 2))
    with tqdm(total=total, desc="judge", unit="token", unit_scale=True, disable=not todo) as bar:
        for batch in todo:
            found = [{"stage": "judged", "sample": sample} for sample in batch]
            for which, name in enumerate(names, start=1):
                rows = [(texts[sample][0], texts[sample][which]) for sample in fill_up(batch, B)]
                for record, (_, continuation), nll in zip(found, rows, _score(reader, judge.bos_id, rows, bar)):
                    record |= {f"{name}_nll": nll, f"{name}_num_tokens": len(continuation)}
            records.add(found)


def _score(reader: Reader, bos_id: int, rows: list[tuple[np.ndarray, np.ndarray]], bar: tqdm) -> list[float]:
    """NLL of each continuation given its prompt, summed over its tokens."""
    texts = [np.concatenate(row) for row in rows]
    longest = max(map(len, texts))
    # Filled up with zeros at the end: nothing that counts comes after them.
    filled = np.stack([np.pad(text, (0, longest - len(text))) for text in texts])
    _, nll_BT = read(reader, reader.start(bos_id, len(rows)), filled, bar)
    spans = [(len(prompt), len(prompt) + len(continuation)) for prompt, continuation in rows]
    return [float(nll[start:stop].sum(dtype=np.float64)) for nll, (start, stop) in zip(nll_BT, spans)]


def _in_tokens_of(judge: Judge, plan: Plan, record: dict) -> list[np.ndarray]:
    """Prompt, continuation and true continuation, as the judge reads them: the text is the same for every tokenizer."""
    if judge.tokenizer.fingerprint != plan.tokenizer.fingerprint:
        texts = (record[name] for name in ("prompt", "generated", "reference"))
        return [encode(judge.tokenizer, text, judge.config.model.vocab_size) for text in texts]
    start, P = record["start"], plan.prompt_tokens
    document = plan.store.stretch(start, start + P + plan.num_tokens)
    return [document[:P], np.array(record["tokens"], np.int32), document[P:]]


def _text_after(tokenizer: Tokenizer, prompt, ids) -> str:
    """The text of tokens that follow others: some tokenizers drop a space where a text begins."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    # A character that the prompt ends within is another one in the whole.
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)
