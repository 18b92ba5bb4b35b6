"""Continuations are of held-out documents; a judge that is the model agrees with it; others read the same text."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from tests.evaluation.conftest import BOS, DOCUMENT_LENGTHS, T, make_run, write_store
from ttt_e2e.data.store import TokenStore
from ttt_e2e.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from ttt_e2e.evaluation import generation
from ttt_e2e.evaluation.generation import Generation, Settings, find_documents
from ttt_e2e.evaluation.subject import Subject
from ttt_e2e.inference import sampling
from ttt_e2e.inference.generate import load_reader
from ttt_e2e.inference.settings import Sampling
from ttt_e2e.runs.directory import load_config

P, N = 21, 14  # tokens of a prompt, and of its continuation
SETTINGS = Settings(P, N, samples=3, sampling=Sampling(temperature=0.8), seed=3)


def evaluate(config, checkpoint, output, settings) -> dict:
    return Generation().evaluate(Subject(config, checkpoint), output, settings)


def records(output) -> dict:
    lines = [json.loads(line) for line in (output / "generation.jsonl").read_text().splitlines()[1:]]
    return {(line["stage"], line["sample"]): line for line in lines}


@pytest.fixture(scope="module")
def whole(config, workdir, tmp_path_factory):
    """The model judged by itself: its result, and the directory that it is in."""
    output = tmp_path_factory.mktemp("whole")
    return evaluate(config, workdir, output, SETTINGS), output


@pytest.fixture(scope="module")
def byte_judge(store_path, tmp_path_factory):
    """Another model of the same tokenizer."""
    return make_run(tmp_path_factory.mktemp("judges") / "bytes", store_path, seed=1, hidden_size=8)


@pytest.fixture(scope="module")
def piece_judge(store_path, tmp_path_factory):
    """A judge with full attention that reads pieces of several characters."""
    directory, store = tmp_path_factory.mktemp("pieces"), TokenStore.open(store_path, "val")
    text = ByteTokenizer().decode(store.stretch(0, store.num_tokens))
    (directory / "store").mkdir()
    train_sentencepiece([text], 300, directory / "store/tokenizer.model")
    tokenizer = SentencePieceTokenizer(directory / "store/tokenizer.model")
    write_store(directory / "store", tokenizer)
    sizes = {"vocab_size": 300, "sliding_window": 0, "num_fast_blocks": 0}
    return make_run(directory / "run", directory / "store", bos_id=tokenizer.bos_id, **sizes)


@pytest.mark.parametrize("chunk", [7, 128, 2**20])
def test_documents_are_found_where_they_begin(store_path, monkeypatch, chunk):
    monkeypatch.setattr(generation, "CHUNK", chunk)
    store = TokenStore.open(store_path, "val")
    begins = np.cumsum([1, *(length + 1 for length in DOCUMENT_LENGTHS)])[:-1]
    for least, count in ((1, 99), (60, 99), (61, 99), (400, 99), (400, 2), (700, 99), (701, 99)):
        expected = [int(begin) for begin, length in zip(begins, DOCUMENT_LENGTHS) if length >= least][:count]
        found, longest = find_documents(store, BOS, least, count)
        assert found == expected
        assert longest == max(DOCUMENT_LENGTHS)
    assert find_documents(store, 300, 1, 99) == ([], 0)


def test_judge_and_model_agree_where_they_are_the_same(whole):
    result, output = whole
    found = records(output)
    for sample in range(3):
        generated, judged = found["generated", sample], found["judged", sample]
        assert judged["generated_nll"] == pytest.approx(generated["own_nll"], rel=1e-4)
        assert judged["generated_num_tokens"] == len(generated["tokens"])
    assert result["generated"]["judge_nll_per_token"] == pytest.approx(
        result["generated"]["own_nll_per_token"], rel=1e-4
    )
    assert result["judge_step"] == result["step"] == 0


def test_a_record_is_the_beginning_of_a_document_and_what_follows_it(config, workdir, whole):
    """The NLL of what truly follows is that of reading the document; tokens and bytes are counted as they are."""
    result, output = whole
    found, store = records(output), TokenStore.open(config.data.path, "val")
    reader = load_reader(config, workdir, 0)
    begins, _ = find_documents(store, BOS, P + N, 3)
    sums = np.zeros(4)
    for sample, begin in enumerate(begins):
        document, generated, judged = (
            store.stretch(begin, begin + P + N),
            *(found[s, sample] for s in ("generated", "judged")),
        )
        assert store.stretch(begin - 1, begin) == [BOS]
        assert generated["prompt"] == ByteTokenizer().decode(document[:P])
        assert generated["reference"] == ByteTokenizer().decode(document[P:])
        assert generated["generated"] == ByteTokenizer().decode(generated["tokens"])
        _, nll = reader.read(reader.start(BOS), document[None])
        assert judged["reference_nll"] == pytest.approx(nll[0, P:].sum(), rel=1e-4)
        sums += judged["generated_nll"], len(generated["tokens"]), judged["reference_nll"], N
    assert result["reference"]["judge_nll_per_token"] == pytest.approx(sums[2] / sums[3])
    assert result["reference"]["judge_nll_per_byte"] == pytest.approx(sums[2] / sums[3])  # a token is a byte here
    assert result["generated"]["judge_nll_per_token"] == pytest.approx(sums[0] / sums[1])


def test_what_is_generated_is_what_a_batch_of_one_would_be(config, workdir, whole, tmp_path):
    alone = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=1))
    evaluate(alone, workdir, tmp_path, SETTINGS)
    one_by_one, together = records(tmp_path), records(whole[1])
    assert [one_by_one["generated", n]["tokens"] for n in range(3)] == [
        together["generated", n]["tokens"] for n in range(3)
    ]


def test_bos_ends_a_continuation(config, workdir, tmp_path, monkeypatch):
    """A model that is made to say BOS from the sixth token on, in one row only."""
    choose = sampling.choose

    def choose_bos(keys, index, *args):
        tokens = np.array(choose(keys, index, *args))
        if index >= 5:
            tokens[1] = BOS
        return np.where((np.arange(len(tokens)) != 1) & (tokens == BOS), 97, tokens)

    monkeypatch.setattr(sampling, "choose", choose_bos)
    result = evaluate(config, workdir, tmp_path, SETTINGS)
    lengths = [len(records(tmp_path)["generated", n]["tokens"]) for n in range(3)]
    assert lengths == [N, 5, N]
    assert [records(tmp_path)["generated", n]["ended_by"] for n in range(3)] == ["length", "bos", "length"]
    assert result["ended_by_bos"] == 1 and result["generated"]["num_tokens"] == 2 * N + 5
    assert result["generated"]["judge_nll_per_token"] == pytest.approx(
        result["generated"]["own_nll_per_token"], rel=1e-4
    )


def test_a_model_that_says_nothing_has_no_score(config, workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "choose", lambda keys, *args: np.full(len(keys), BOS))
    result = evaluate(config, workdir, tmp_path, SETTINGS)
    assert result["generated"]["num_tokens"] == 0
    assert result["generated"]["own_nll_per_token"] is result["generated"]["judge_nll_per_byte"] is None
    assert result["reference"]["judge_nll_per_token"] > 0


# ------------------------------------------------------------------------------------------------------ other judges


def test_another_judge_reads_the_same_tokens_if_its_tokenizer_is_the_same(config, workdir, byte_judge, whole, tmp_path):
    for judge in (byte_judge, byte_judge / "checkpoints/0"):
        result = evaluate(config, workdir, tmp_path, dataclasses.replace(SETTINGS, judge=str(judge)))
        own, found = records(whole[1]), records(tmp_path)
        assert found["generated", 1] == own["generated", 1]
        assert found["judged", 1]["generated_nll"] != own["judged", 1]["generated_nll"]
        assert result["generated"]["judge_num_tokens"] == result["generated"]["num_tokens"]


def test_a_judge_of_another_tokenizer_reads_the_same_text(config, workdir, piece_judge, tmp_path):
    result = evaluate(config, workdir, tmp_path, dataclasses.replace(SETTINGS, judge=str(piece_judge)))
    assert result["reference"]["judge_num_tokens"] < 3 * N
    assert result["reference"]["num_bytes"] == 3 * N
    nll = result["reference"]["judge_nll_per_token"] * result["reference"]["judge_num_tokens"]
    assert result["reference"]["judge_nll_per_byte"] == pytest.approx(nll / (3 * N))

    judge_config, tokenizer = load_config(piece_judge), SentencePieceTokenizer(piece_judge / "../store/tokenizer.model")
    reader = load_reader(judge_config, piece_judge, 200)
    found = records(tmp_path)
    prompt, reference = (tokenizer.encode(found["generated", 2][name]) for name in ("prompt", "reference"))
    _, nll = reader.read(reader.start(tokenizer.bos_id), np.concatenate([prompt, reference])[None])
    assert found["judged", 2]["reference_nll"] == pytest.approx(nll[0, len(prompt) :].sum(), rel=1e-4)


def test_a_killed_evaluation_goes_on_to_the_same_result(config, workdir, whole, tmp_path, monkeypatch):
    result, output = whole
    lines = (output / "generation.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3 + 3
    batches = []
    start = generation._continue
    monkeypatch.setattr(generation, "_continue", lambda *args: (batches.append(args[2]), start(*args))[1])
    for kept, continued in ((3, [[2, 2]]), (5, [])):  # within the second batch of each stage
        batches.clear()
        (tmp_path / "generation.jsonl").write_text("".join(lines[:kept]) + lines[kept][:9])
        assert evaluate(config, workdir, tmp_path, SETTINGS) == result
        assert batches == continued
        assert (tmp_path / "generation.json").read_bytes() == (output / "generation.json").read_bytes()


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_and_writes_the_same_beside_the_others(run, workdir, whole, tmp_path):
    sizes = (f"--generation_prompt_tokens={P}", f"--generation_tokens={N}", "--generation_samples=3")
    flags = ("--generation", *sizes, "--temperature=0.8", "--seed=3", "--context_lengths=8", "--num_stretches=2")
    code, out, _ = run("evaluate", f"--workdir={workdir}", f"--output={tmp_path}", *flags)
    assert code == 0
    printed = json.loads(out)
    assert set(printed) == {"output", "context_lengths", "generation"}
    assert printed["generation"] == {name: value for name, value in whole[0].items() if name != "about"}
    assert json.loads((tmp_path / "generation.json").read_text()) == whole[0]


def test_the_prompt_is_half_the_trained_length_by_default(config):
    assert Generation().check(Subject(config, ""), Settings()).prompt_tokens == T // 2


def _remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


SPOILT = {
    "config.json": "no run directory",
    "checkpoints": "no complete step",
    "checkpoints/0/params": "no complete step|cannot be read|incomplete",
    "checkpoints/0/progress": "incomplete",
}


@pytest.mark.parametrize("part", SPOILT)
def test_an_unreadable_judge_is_one_line_before_anything_is_run(part, run, workdir, byte_judge, tmp_path):
    judge = tmp_path / "judge"
    shutil.copytree(byte_judge, judge)
    _remove(judge / part)
    flags = (f"--output={tmp_path / 'out'}", "--generation", f"--judge={judge}", "--context_lengths=8")
    code, out, lines = run("evaluate", f"--workdir={workdir}", *flags)
    assert (code, out) == (2, "")
    assert len(lines) == 1, lines
    assert re.search(f"^error: judge {judge}: .*({SPOILT[part]})", lines[0])
    assert not (tmp_path / "out").exists()


BAD_INPUT = {
    "--generation --judge=DIR/no": "judge DIR/no: .*no is no run directory, and no checkpoint in one",
    "--generation --generation_tokens=0": "generation_tokens is 0, but it must be at least 1",
    "--generation --generation_prompt_tokens=-1": "generation_prompt_tokens is -1",
    "--generation --generation_samples=0": "generation_samples is 0",
    "--generation --generation_tokens=800": r"\+ generation_tokens is 816, but the longest document of .* has 700",
    "--generation --temperature=-1": "temperature is -1.0",
    "--generation --seed=-1": "seed is -1",
    "--judge=DIR": "--judge belongs to --generation",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(flags, check_refused):
    check_refused(flags, BAD_INPUT[flags])
