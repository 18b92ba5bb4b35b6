"""Tasks of lm-evaluation-harness, and the model that they ask. Imports `lm_eval` in functions only: it is an extra."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ttt_e2e.config import suggestion
from ttt_e2e.errors import UserError, first_line
from ttt_e2e.evaluation.answers import SEED, Answers, Manner, Prompt, Text, batches, equal_batches, filled
from ttt_e2e.inference.settings import Sampling
from ttt_e2e.progress import progress_bar
from ttt_e2e.runs.files import parse_json
from ttt_e2e.strict_json import to_json

if TYPE_CHECKING:
    from ttt_e2e.data.tokenizers import Tokenizer
    from ttt_e2e.evaluation.records import Records

KEY = ("learn", "kind", "request", "part", "digest")  # fields that identify a record
GENERATION = ("until", "do_sample", "max_gen_toks", "temperature", "top_k", "top_p", "repetition_penalty")
MAX_NEW_TOKENS = 256  # where a task does not say
LONGEST_HINT = 200  # characters; there are some 15,000 tasks


def require_lm_eval() -> None:
    """Raises `UserError` where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm_eval needs lm_eval, which is not installed: pip install 'ttt-e2e[lm_eval]'")


@lru_cache(maxsize=1)  # made once for the check and the evaluation, as some tasks make their data
def load_tasks(names: tuple[str, ...], directory: str, metadata: str, fingerprint: str):
    """Loads tasks, groups and tags of tasks by name.

    Args:
      names: names that the harness knows, or the YAML files in `directory` define.
      directory: directory of the user's own tasks; "" = none.
      metadata: a JSON object, for tasks that make their own data.
      fingerprint: that of the tokenizer in `AutoTokenizer.known`, by which such tasks measure lengths.

    Returns:
      The `TaskManager`, which loads these tasks whatever it is asked for.

    Raises:
      UserError: there is no such task, or it cannot be loaded (its data are not there, it needs another package).
    """
    manager = _find_tasks(
        names, directory, parse_json(metadata or "{}", "lm_eval_metadata") | {"tokenizer": fingerprint}
    )
    # As the harness does before it loads tasks, whose data may be drawn.
    random.seed(0)
    np.random.seed(SEED)
    try:
        with _our_tokenizers(), redirect_stdout(sys.stderr):
            loaded = manager.load(list(names))
    except Exception as error:  # whatever is wrong with a task, its data or the network
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"lm_eval is {','.join(names)}, but these tasks cannot be loaded ({reason})") from error
    manager.load = lambda _: loaded
    return manager


def check_tasks(manager, max_length: int) -> None:
    """Raises `UserError` where one of the tasks of `load_tasks` asks for what there is not, or for too many tokens."""
    for name, task in manager.load([])["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"lm_eval names {name}, which runs code of the model's or takes more than text")
        if task.OUTPUT_TYPE == "generate_until":
            num_tokens = _manner(name, task.config.generation_kwargs or {}).max_tokens
            if 0 < max_length <= num_tokens:
                raise UserError(f"lm_eval_max_length is {max_length}, but {name} generates {num_tokens} tokens")


def _find_tasks(names: tuple[str, ...], directory: str, metadata: dict):
    """Makes a `TaskManager` that has these tasks. Raises `UserError` where one is unknown."""
    from lm_eval.tasks import TaskManager

    path = Path(directory) if directory else None
    if path:
        if not path.is_dir():
            raise UserError(f"lm_eval_tasks_dir is {directory}, but it must be a directory of tasks as YAML files")
        manager = TaskManager(include_path=path, include_defaults=False, metadata=metadata)
        if set(names) <= set(manager.all_tasks):
            return manager  # without the harness's own tasks, which take 15 seconds to index
    manager = TaskManager(include_path=path, metadata=metadata)
    for name in names:
        if name not in manager.all_tasks:
            hint = suggestion(name, manager.all_tasks)
            hint = hint if len(hint) < LONGEST_HINT else "`lm-eval ls tasks` lists them"
            raise UserError(f"lm_eval names {name!r}, which is no task: {hint}")
    return manager


class AutoTokenizer:
    """Stands in for that of transformers, by which the tasks of RULER measure their prompts, and gives ours."""

    known: ClassVar[dict[str, Tokenizer]] = {}  # by fingerprint

    @classmethod
    def from_pretrained(cls, name: str, **_) -> Callable[[str], Any]:
        """A function from a text to an object with its `input_ids`."""
        return lambda text: SimpleNamespace(input_ids=cls.known[name].encode(text))


@contextmanager
def _our_tokenizers() -> Iterator[None]:
    """Within it, `from transformers import AutoTokenizer` imports ours, whether or not transformers is installed."""
    is_installed = importlib.util.find_spec("transformers") is not None
    module = importlib.import_module("transformers") if is_installed else ModuleType("transformers")
    theirs = {"AutoTokenizer": module.AutoTokenizer} if is_installed else {}
    module.AutoTokenizer = AutoTokenizer
    if not is_installed:
        module.PreTrainedTokenizerBase = AutoTokenizer  # `datasets` looks for it
        sys.modules["transformers"] = module
    try:
        yield
    finally:
        vars(module).update(theirs)
        if not is_installed:
            del sys.modules["transformers"]


@dataclass(frozen=True)
class Desk:
    """Takes requests of the harness, as tokens, and returns their answers in order; each becomes a record.

    Requests that have a record of an earlier start are not run again.
    """

    answers: Answers
    records: Records
    batch_size: int
    max_length: int = 0  # tokens that are read at most, as by the harness's own models; 0 = any number
    add_bos_token: bool = True  # whether every request begins with BOS, and not only one without a context
    answered: list[dict] = field(default_factory=list)  # the records of all requests so far

    def encode(self, text: str, *, begins: bool) -> list[int]:
        """Token ids of a text, after BOS where it `begins` a request."""
        ids = self.answers.tokenizer.encode(text).tolist()
        return [self.answers.bos_id, *ids] if begins and self.add_bos_token else ids

    def windows(self, document: str) -> list[tuple[list[int], list[int]]]:
        """Cuts a document into (context, continuation) pairs: one, or as many as the harness's windows are."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        ids, bos_id = self.encode(document, begins=False), self.answers.bos_id
        if not self.max_length:
            return [([bos_id], ids)]
        return list(map(make_disjoint_window, get_rolling_token_windows(ids, bos_id, self.max_length, 1)))

    def score(self, kind: str, requests: Sequence, pairs: list[list[tuple]]) -> list[list[dict]]:
        """Scores the continuations of the (context, continuation) pairs of each request; returns as many answers."""
        jobs = [(i, part) for i, of_request in enumerate(pairs) for part in range(len(of_request))]
        texts = [self._text(*pairs[i][part]) for i, part in jobs]
        found = self._run(
            [_names(self.answers.learn, kind, i, part, requests[i]) for i, part in jobs],
            batches([len(text.tokens) for text in texts], self.batch_size),
            lambda batch: self.answers.score([texts[i] for i in batch], greedy=kind == "loglikelihood"),
        )
        of_requests: list[list[dict]] = [[] for _ in requests]
        for (i, _), answer in zip(jobs, found):
            of_requests[i].append(answer)
        return of_requests

    def generate(self, requests: Sequence) -> list[dict]:
        """Continues the context of each request in the manner that it asks for."""
        manners = [_manner(request.task_name, request.args[1]) for request in requests]
        contexts = [self.encode(request.args[0], begins=True) or [self.answers.bos_id] for request in requests]
        if self.max_length:
            rooms = [self.max_length - manner.max_tokens for manner in manners]
            contexts = [ids[-room:] for ids, room in zip(contexts, rooms)]
        prompts = [Prompt(np.array(ids, np.int32), number) for number, ids in enumerate(contexts)]
        return self._run(
            [_names(self.answers.learn, "generate_until", i, 0, request) for i, request in enumerate(requests)],
            equal_batches([(manner, len(ids)) for manner, ids in zip(manners, contexts)], self.batch_size),
            lambda batch: self.answers.continue_([prompts[i] for i in batch], manners[batch[0]]),
        )

    def _text(self, context: list[int], continuation: list[int]) -> Text:
        """The tokens of a context and a continuation, of which the beginning is cut off where they are too many."""
        tokens = [*context, *continuation][-(self.max_length + 1) if self.max_length else 0 :]
        return Text(np.array(tokens, np.int32), min(len(continuation), len(tokens) - 1))

    def _run(self, names: list[dict], todo: list[list[int]], run: Callable) -> list[dict]:
        """Runs the batches that have no records yet, and returns the records of all requests.

        names: of each request, what its record has besides the answer.
        """
        keys = [tuple(name[each] for each in KEY) for name in names]
        done = self.records.done
        todo = [batch for batch in todo if not all(keys[i] in done for i in batch)]
        with progress_bar(total=sum(map(len, todo)), desc="lm_eval", unit="request", disable=not todo) as bar:
            for batch in todo:
                found = run(filled(batch, self.batch_size))
                self.records.add([names[i] | answer for i, answer in zip(batch, found)])
                bar.update(len(batch))
        found = [self.records.done[key] for key in keys]
        self.answered.extend(found)
        return found


def make_model(desk: Desk):
    """Makes the `lm_eval.api.model.LM` that has `desk` answer the harness's requests."""
    from lm_eval.api.model import TemplateLM

    class Model(TemplateLM):
        eot_token_id = prefix_token_id = desk.answers.bos_id

        def tok_encode(self, string, add_special_tokens=None, **_):
            return desk.encode(string, begins=add_special_tokens is None)

        def loglikelihood(self, requests, disable_tqdm=False):
            found = desk.score("loglikelihood", requests, [[self.split(*request.args)] for request in requests])
            return [(answer["loglikelihood"], answer["is_greedy"]) for [answer] in found]

        def split(self, context, continuation):
            if not context:
                return [self.prefix_token_id], desk.encode(continuation, begins=False)
            context_ids, continuation_ids = self._encode_pair(context, continuation)
            return context_ids or [self.prefix_token_id], continuation_ids

        def _loglikelihood_tokens(self, requests, **_):
            raise NotImplementedError  # only the `loglikelihood` that is overridden needs it

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows = [desk.windows(*request.args) for request in requests]
            found = desk.score("loglikelihood_rolling", requests, windows)
            return [sum(answer["loglikelihood"] for answer in of_document) for of_document in found]

        def generate_until(self, requests, disable_tqdm=False):
            return [answer["text"] for answer in desk.generate(requests)]

    return Model()


def _names(learn: bool, kind: str, number: int, part: int, request) -> dict:
    """What a record has besides the answer: `KEY`, and the task and the document that the request is from."""
    digest = hashlib.blake2b(to_json(request.args, default=str).encode(), digest_size=8).hexdigest()
    names = dict(zip(KEY, (learn, kind, number, part, digest)))
    return names | {"task": request.task_name, "document": request.doc_id, "choice": request.idx}


def _manner(task: str, wishes: dict) -> Manner:
    """How a task's prompts are to be continued. Raises `UserError` where it asks for what there is not."""
    from lm_eval.models.utils import normalize_gen_kwargs

    wishes = {name: value for name, value in normalize_gen_kwargs(wishes, MAX_NEW_TOKENS).items() if value is not None}
    for name in wishes:
        if name not in GENERATION:
            raise UserError(f"lm_eval task {task} generates by {name!r}, but there are {', '.join(GENERATION)}")
    temperature = wishes.get("temperature", 1.0) if wishes["do_sample"] else 0.0
    others = {name: wishes[name] for name in ("top_k", "top_p", "repetition_penalty") if name in wishes}
    return Manner(wishes["max_gen_toks"], tuple(filter(None, wishes["until"])), Sampling(temperature, **others))
