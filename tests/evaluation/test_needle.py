"""Prompts are what they are said to be; a reader that recalls scores 1, and one that cannot gains nothing."""

import dataclasses
import json
import re
from itertools import product

import numpy as np
import pytest

from tests.evaluation.conftest import BOS, FakeReader, write_store
from tests.lossy_model import train_lossy_model
from ttt_e2e.data.store import TokenStore
from ttt_e2e.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation import needle
from ttt_e2e.evaluation.haystacks import NOISE, REACH, TASKS, Haystacks
from ttt_e2e.evaluation.needle import Needle, Settings
from ttt_e2e.evaluation.subject import Subject

LENGTHS, DEPTHS = (400, 700), (0, 30, 100)


def evaluate(config, checkpoint, output, settings) -> dict:
    return Needle().evaluate(Subject(config, checkpoint), output, settings)


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def haystacks(request, store_path, tmp_path_factory):
    """Over bytes, and over the pieces of a vocabulary that was learned from the same text."""
    store = TokenStore.open(store_path, "val")
    if request.param == "bytes":
        return Haystacks(ByteTokenizer(), store, BOS, 257)
    directory = tmp_path_factory.mktemp("pieces")
    texts = [ByteTokenizer().decode(store.stretch(0, store.num_tokens)), NOISE, "One of the special magic numbers"]
    train_sentencepiece(texts, 320, directory / "tokenizer.model")
    tokenizer = SentencePieceTokenizer(directory / "tokenizer.model")
    write_store(directory / "store", tokenizer)
    return Haystacks(tokenizer, TokenStore.open(directory / "store", "val"), tokenizer.bos_id, 320)


def occurrences(tokens, part) -> list[int]:
    return [i for i in range(len(tokens) - len(part) + 1) if np.array_equal(tokens[i : i + len(part)], part)]


@pytest.mark.parametrize("task, length, depth", [*product(TASKS, LENGTHS, DEPTHS)])
def test_a_prompt_has_the_length_and_the_needle_once_where_it_should_be(haystacks, task, length, depth):
    prompt = haystacks.prompt(task, length, depth, 0)
    parts = haystacks.parts(task, length, depth, 0)
    assert len(prompt.tokens_L) == len(prompt.control_L) == length
    assert occurrences(prompt.tokens_L, parts.needle) == [prompt.position]
    assert [prompt.position + i for i in occurrences(parts.needle, prompt.answer)] == occurrences(
        prompt.tokens_L, prompt.answer
    )
    assert occurrences(prompt.control_L, prompt.answer) == occurrences(prompt.tokens_L, prompt.other) == []
    hay = length - len(parts.begin) - len(parts.needle) - len(parts.end)
    assert abs((prompt.position - len(parts.begin)) / hay - depth / 100) <= REACH + 1 / hay
    assert list(prompt.tokens_L[-len(parts.end) :]) == list(parts.end) == list(prompt.control_L[-len(parts.end) :])
    assert haystacks.bos_id not in prompt.tokens_L

    text = haystacks.tokenizer.decode([*prompt.tokens_L, *prompt.answer])
    assert text.endswith(f" is: {prompt.value}")
    assert text.count(prompt.value) == 2
    pattern = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if task == 3 else r"\d{7}"
    assert re.fullmatch(pattern, prompt.value)


@pytest.mark.parametrize("task", TASKS)
def test_a_tokenizer_without_new_lines_has_needles_too(task, tmp_path):
    """As SentencePiece trains it by default: documents are then divided by a full stop."""
    train_lossy_model(tmp_path / "tokenizer.model", "0123456789ORWTBUID", 160)
    tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    assert len(tokenizer.encode("\n")) == 0
    write_store(tmp_path / "store", tokenizer, lengths=(40,) * 60)
    haystacks = Haystacks(tokenizer, TokenStore.open(tmp_path / "store", "val"), tokenizer.bos_id, 160)
    prompt = haystacks.prompt(task, 800, 50, 0)
    assert len(prompt.tokens_L) == 800 and tokenizer.bos_id not in prompt.tokens_L
    assert tokenizer.decode([*prompt.tokens_L, *prompt.answer]).count(prompt.value) == 2


def test_a_tokenizer_that_cannot_write_the_value_is_refused(tmp_path):
    train_lossy_model(tmp_path / "tokenizer.model")  # it knows no digits
    tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    write_store(tmp_path / "store", tokenizer)
    haystacks = Haystacks(tokenizer, TokenStore.open(tmp_path / "store", "val"), tokenizer.bos_id, 120)
    with pytest.raises(UserError, match=r"needle takes a tokenizer that can write '\d{7}', and this one makes '.*⁇"):
        haystacks.parts(2, 800, 50, 0)


def test_noise_is_ever_the_same_lines_and_the_needle_stands_between_two(haystacks):
    prompt = haystacks.prompt(1, 2000, 50, 0)
    lines = haystacks.tokenizer.decode(prompt.tokens_L).split("\n")
    (place,) = (i for i, line in enumerate(lines) if prompt.value in line)
    assert 1 < place < len(lines) - 4
    assert NOISE.endswith(lines[1] + "\n")  # as much of a line as makes the length
    assert {line + "\n" for line in [*lines[2:place], *lines[place + 1 : -2]]} == {NOISE}


def test_natural_text_is_held_out_text_around_the_needle(haystacks):
    prompt, parts = (of(2, 700, 50, 3) for of in (haystacks.prompt, haystacks.parts))
    hay = prompt.control_L[len(parts.begin) : -len(parts.end)]
    split = haystacks.store.stretch(0, haystacks.store.num_tokens)
    newline = haystacks.tokenizer.encode("\n")[-1]
    assert len(occurrences(np.where(split == haystacks.bos_id, newline, split), hay)) == 1
    rest = np.delete(prompt.tokens_L, np.arange(prompt.position, prompt.position + len(parts.needle)))
    assert np.array_equal(rest[len(parts.begin) : -len(parts.end)], hay[len(parts.needle) :])


def test_seeds_are_the_place_alone(haystacks):
    def value(*place):
        return haystacks.prompt(*place).value

    places = list(product(TASKS, LENGTHS, DEPTHS, range(3)))
    values = [value(*place) for place in places]
    assert values == [value(*place) for place in places]
    assert len(set(values)) == len(values)


# ------------------------------------------------------------------------------------------------------- what is found


def copying_logits(tokens_n):
    """Predicts what followed the longest earlier copy of how the text ends: an induction head, a perfect memory."""
    text = bytes(int(token) % 256 for token in tokens_n)
    size = next((n for n in range(len(text) - 1, 0, -1) if text.find(text[-n:]) < len(text) - n), 0)
    logits = np.zeros(257)
    logits[text[text.find(text[-size:]) + size] if size else 0] = 9.0
    return logits


def constant_logits(tokens_n):
    return np.zeros(257)


def digits_where_there_were_digits(tokens_n):
    """Recalls what values look like, and not which one it was."""
    logits = np.zeros(257)
    logits[48:58] = 5.0 * (np.isin(tokens_n, range(48, 58)).sum() >= 7)
    return logits


def found_by(next_logits, config, workdir, output, monkeypatch, **settings):
    class PromptReader(FakeReader):
        """Does not predict what it reads of the prompt, as a model would."""

        def read(self, state, tokens_Bn, *, learn=True, bar=None):
            return state._replace(tokens_Bn=np.hstack([state.tokens_Bn, tokens_Bn])), None

    monkeypatch.setattr(Subject, "reader", lambda subject, _: PromptReader(subject.config, next_logits))
    return evaluate(config, workdir, output, Settings(tuple(TASKS), LENGTHS, DEPTHS, **settings))


def test_a_reader_that_recalls_scores_one(config, workdir, tmp_path, monkeypatch):
    result = found_by(copying_logits, config, workdir, tmp_path, monkeypatch, samples=3)
    assert [cell["exact_match"] for cell in result["cells"]] == [1.0] * len(TASKS) * len(LENGTHS) * len(DEPTHS)
    assert all(cell["recall_gain"] > 5 and cell["value_gain"] > 3 and cell["nll"] < 0.5 for cell in result["cells"])
    assert [task["exact_match"] for task in result["tasks"]] == [1.0] * 3


def test_a_reader_that_recalls_nothing_scores_and_gains_nothing(config, workdir, tmp_path, monkeypatch):
    result = found_by(constant_logits, config, workdir, tmp_path, monkeypatch, samples=1)
    for cell in result["cells"]:
        assert cell["exact_match"] == cell["recall_gain"] == cell["value_gain"] == 0
        assert cell["nll"] == pytest.approx(np.log(257))
        assert cell["recall_gain_standard_error"] is None


def test_to_recall_what_a_value_looks_like_gains_recall_and_no_value(config, workdir, tmp_path, monkeypatch):
    result = found_by(digits_where_there_were_digits, config, workdir, tmp_path, monkeypatch, samples=1)
    numbers = [cell for cell in result["cells"] if cell["task"] != 3]
    assert all(cell["recall_gain"] > 2 and cell["value_gain"] == pytest.approx(0) for cell in numbers)


@pytest.fixture(scope="module")
def settings():
    return Settings((1, 3), (401,), (0, 100), samples=3)


@pytest.fixture(scope="module")
def whole(config, workdir, settings, tmp_path_factory):
    """A model's result, and the directory that it is in."""
    output = tmp_path_factory.mktemp("whole")
    return evaluate(config, workdir, output, settings), output


def test_the_nll_of_an_answer_is_that_of_reading_it(config, workdir, settings, whole):
    subject = Subject(config, workdir)
    reader, (haystacks, _) = subject.reader(0), Needle().check(subject, settings)
    records = [json.loads(line) for line in (whole[1] / "needle.jsonl").read_text().splitlines()[1:]]
    assert len(records) == 2 * 2 * 3
    for record in records[::5]:
        prompt = haystacks.prompt(*(record[name] for name in ("task", "length", "depth", "sample")))
        for name, tokens_L, value in (
            ("nll", prompt.tokens_L, prompt.answer),
            ("nll_control", prompt.control_L, prompt.answer),
            ("nll_other_value", prompt.tokens_L, prompt.other),
        ):
            _, nll = reader.read(reader.start(BOS), np.concatenate([tokens_L, value])[None])
            assert record[name] == pytest.approx(nll[0, len(tokens_L) :].mean(), rel=1e-4)
        assert record["answer"] == prompt.value
        assert record["match"] == record["said"].lstrip().startswith(prompt.value)


def test_a_killed_evaluation_goes_on_to_the_same_result(config, workdir, settings, whole, tmp_path, monkeypatch):
    result, output = whole
    lines = (output / "needle.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "needle.jsonl").write_text("".join(lines[: 1 + 3 + 2]) + lines[6][:30])  # 1 cell and 2 of 3 samples
    asked = []
    ask = needle.ask
    monkeypatch.setattr(needle, "ask", lambda *args: (asked.append(len(args[2])), ask(*args))[1])
    assert evaluate(config, workdir, tmp_path, settings) == result
    assert asked == [2] * (2 * 4 - 3)
    assert (tmp_path / "needle.json").read_bytes() == (output / "needle.json").read_bytes()


def test_lengths_by_default_are_those_that_fit(config, workdir):
    def lengths(seq_len, task):
        longer = dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=seq_len))
        return Needle().check(Subject(longer, ""), Settings((task,)))[1]

    assert lengths(920, 2) == (230, 460, 920, 1840)
    assert lengths(920, 3) == (460, 920, 1840)  # a UUID takes more tokens
    assert lengths(1600, 2) == (400, 800, 1600)  # there are no 3200 tokens of text,
    assert lengths(1600, 1) == (400, 800, 1600, 3200)  # but of noise


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_the_tasks_and_writes_the_cells(run, workdir, tmp_path):
    flags = ("--needle=1", "--needle_lengths=401", "--needle_depths=50", "--needle_samples=2")
    code, out, _ = run("evaluate", f"--workdir={workdir}", f"--output={tmp_path}", *flags)
    assert code == 0
    written = json.loads((tmp_path / "needle.json").read_text())
    assert json.loads(out)["needle"]["tasks"] == written["tasks"]
    (cell,) = written["cells"]
    assert {name: cell[name] for name in ("task", "length", "depth")} == {"task": 1, "length": 401, "depth": 50}


BAD_INPUT = {
    "--needle=4": r"needle is 4, but it takes some of 1 \(a number in repeated noise\)",
    "--needle=one": "--needle=one: it takes integers",
    "--needle=1": r"needle_lengths has 64, .* at least 2\d\d tokens \(by default, .* config.train.seq_len\)",
    "--needle=1 --needle_lengths=0": "needle_lengths is 0",
    "--needle=1,3 --needle_lengths=230": "needle_lengths has 230, but a prompt of task 3 takes at least 2",
    "--needle=2 --needle_lengths=2017": "needle_lengths has 2017, but .*val has 2016 tokens",
    "--needle=1 --needle_lengths=400 --needle_depths=101": "needle_depths is 101, but it takes percentages",
    "--needle=1 --needle_depths=": "needle_depths is , but",
    "--needle=1 --needle_samples=0": "needle_samples is 0",
    "--needle_samples=2": "--needle_samples belongs to --needle",
    "--needle=1 --needle_lengths=400 --config.data.tokenizer=no.model": "tokenizer is 'no.model'",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(flags, check_refused):
    check_refused(flags, BAD_INPUT[flags])
