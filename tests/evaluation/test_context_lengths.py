"""Lengths are comparable, and what plain evaluation says of the same tokens."""

import dataclasses
import json
import re

import numpy as np
import pytest

from tests.evaluation.conftest import BOS, DOCUMENT_LENGTHS, FakeReader, T, make_run, without_fast_blocks
from ttt_e2e.data.store import TokenStore
from ttt_e2e.evaluation import token_losses
from ttt_e2e.evaluation.context_lengths import ContextLengths, Settings, compared, ratio
from ttt_e2e.evaluation.subject import Subject
from ttt_e2e.inference.reader import Reader
from ttt_e2e.runs.directory import load_config


def evaluate(config, checkpoint, output, settings) -> dict:
    return ContextLengths().evaluate(Subject(config, checkpoint), output, settings)


def by_length(result) -> dict:
    return {entry["length"]: entry for entry in result["lengths"]}


@pytest.mark.parametrize("suffix", ["", "_without_learning"])
def test_at_the_trained_length_the_loss_is_that_of_plain_evaluation(suffix, config, workdir, tmp_path, plain):
    """Of stretches of 2T tokens, every other sequence of T is read again, from its beginning."""
    settings = Settings((T, 2 * T), num_stretches=5)
    entries = by_length(evaluate(config, workdir, tmp_path / suffix, settings))
    nll, is_target = plain[f"token_nll{suffix}"], plain["is_target"]
    last = slice(1, 10, 2)
    assert entries[T][f"loss{suffix}"] == pytest.approx(nll[last][is_target[last]].mean(), rel=1e-5)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=2 * T))
    token_losses.evaluate(longer, workdir, tmp_path / "longer")
    nll = np.load(tmp_path / f"longer/token_nll{suffix}.npy")[:5, T:]
    assert entries[2 * T][f"loss{suffix}"] == pytest.approx(nll[is_target[last]].mean(), rel=1e-5)


@pytest.fixture(scope="module")
def plain(config, workdir, tmp_path_factory):
    output = tmp_path_factory.mktemp("plain")
    token_losses.evaluate(config, workdir, output)
    store = TokenStore.open(config.data.path, "val")
    names = ("token_nll", "token_nll_without_learning")
    tokens = store.sequences(range(store.num_sequences(T)), T)
    return {name: np.load(output / f"{name}.npy") for name in names} | {"is_target": tokens[:, 1:] != BOS}


def test_full_attention_and_lengths_that_end_within_a_mini_batch(store_path, tmp_path):
    workdir = make_run(tmp_path / "full", store_path, num_fast_blocks=0, sliding_window=0)
    config = load_config(workdir)
    result = evaluate(config, workdir, tmp_path / "out", Settings((5, T), num_stretches=3))
    token_losses.evaluate(config, workdir, tmp_path / "plain")
    tokens = TokenStore.open(store_path, "val").sequences(range(3), T)
    nll, is_target = np.load(tmp_path / "plain/token_nll.npy")[:3, -5:], tokens[:, -5:] != BOS
    entries = by_length(result)
    assert entries[T]["loss"] == pytest.approx(nll[is_target].mean(), rel=1e-5)
    fields = {"length", "loss", "standard_error", "difference", "difference_standard_error", "bits_per_byte"}
    assert set(entries[T]) == fields
    # A byte a token: as many bytes as targets.
    assert result["num_bytes"] == result["num_targets"]
    assert entries[T]["bits_per_byte"] == pytest.approx(entries[T]["loss"] / np.log(2))
    assert entries[T]["difference"] == pytest.approx(entries[T]["loss"] - entries[5]["loss"])


@pytest.mark.parametrize("lengths, scored, expected", [((64, 8, 200), 0, 8), ((64, 8, 200), 3, 3), ((200,), 0, 200)])
def test_the_same_targets_are_scored_whatever_the_length(
    lengths, scored, expected, config, workdir, tmp_path, monkeypatch
):
    """Of a reader whose NLL is the token itself, all losses are the mean of the same tokens."""

    class TokenReader(FakeReader):
        def read(self, state, tokens_Bn, *, learn=True, bar=None):
            return state, tokens_Bn.astype(float)

    monkeypatch.setattr(Subject, "reader", lambda subject, _: TokenReader(subject.config, None))
    result = evaluate(without_fast_blocks(config), workdir, tmp_path, Settings(lengths, scored, num_stretches=0))
    tokens = TokenStore.open(config.data.path, "val").sequences(range(sum(DOCUMENT_LENGTHS) // 200), 200)
    targets = tokens[:, -expected:]
    assert result["scored_tokens"] == expected
    assert result["num_targets"] == (targets != BOS).sum()
    for entry in result["lengths"]:
        if max(lengths) == 200:
            assert entry["loss"] == pytest.approx(targets[targets != BOS].mean())
        assert entry["difference"] == 0


def test_the_standard_error_is_that_of_a_mean_where_all_counts_are_equal_and_repeated_draws_agree():
    random = np.random.default_rng(0)
    values = random.normal(2, 1, 20)
    mean, error = ratio(values * 7, np.full(20, 7.0))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(20))
    counts = random.integers(0, 9, (4000, 50)).astype(float)
    drawn = np.array([ratio(random.normal(3, 1, 50) * c, c) for c in counts])
    assert drawn[:, 1].mean() == pytest.approx(drawn[:, 0].std(), rel=0.05)
    assert ratio(np.array([3.0]), np.array([2.0])) == (1.5, None)
    assert ratio(np.zeros(2), np.zeros(2)) == (None, None)


def test_two_runs_are_compared_by_stretch(config, workdir, store_path, tmp_path):
    """The text of stretches differs more than models do: paired, the error is that of the differences alone."""
    other = make_run(tmp_path / "other", store_path, seed=1)
    for name, run, lengths in (("a", workdir, (8, 16, 32)), ("b", other, (16, 32)), ("c", other, (16, 24))):
        evaluate(load_config(run), run, tmp_path / name, Settings(lengths, 8, num_stretches=6))
    first, second, third = (ContextLengths().read(tmp_path / name) for name in "abc")
    entries, ours, theirs = by_length({"lengths": compared(second, first)}), by_length(second), by_length(first)
    assert list(entries) == [16, 32]
    for length, entry in entries.items():
        for suffix in ("", "_without_learning"):
            assert entry[f"loss{suffix}"] == ours[length][f"loss{suffix}"]
            expected = ours[length][f"loss{suffix}"] - theirs[length]["loss"]
            assert entry[f"difference{suffix}"] == pytest.approx(expected)
        sums = [{r["stretch"]: r["nll"] for r in each["records"] if r["length"] == length} for each in (second, first)]
        counts = np.array([r["num_targets"] for r in second["records"] if r["length"] == length], float)
        _, expected = ratio(np.array([sums[0][n] - sums[1][n] for n in range(6)]), counts)
        assert 0 < expected == pytest.approx(entry["difference_standard_error"])
        unpaired = np.hypot(ours[length]["standard_error"], theirs[length]["standard_error"])
        assert entry["difference_standard_error"] != pytest.approx(unpaired, rel=0.01)
    assert [entry["difference"] for entry in compared(first, first)] == [0, 0, 0]
    assert [entry["difference_standard_error"] for entry in compared(first, first)] == [0, 0, 0]
    # Stretches of another longest length are other text: no bars; and no difference where the first has no loss.
    at_16, at_24 = compared(third, first)
    assert at_16["difference"] is not None and at_16["difference_standard_error"] is None
    assert at_24["difference"] is None
    # Nor are there bars where records are gone, or are those of another result.
    (tmp_path / "a/context_lengths.jsonl").rename(tmp_path / "b/context_lengths.jsonl")
    for name, against in (("a", second), ("b", first)):
        entries = compared(ContextLengths().read(tmp_path / name), against)
        assert {entry["difference_standard_error"] for entry in entries} == {None}


# ------------------------------------------------------------------------------------------------ killed and resumed


@pytest.fixture
def settings():
    return Settings((8, 16), num_stretches=5)


def test_a_killed_evaluation_goes_on_to_the_same_result(config, workdir, settings, tmp_path, monkeypatch, caplog):
    whole = evaluate(config, workdir, tmp_path / "whole", settings)
    (tmp_path / "cut").mkdir()
    lines = (tmp_path / "whole/context_lengths.jsonl").read_text().splitlines(keepends=True)
    # 5 stretches of the shorter length; of the other, one batch of two, half of the next, and half a line.
    cut = "".join(lines[: 1 + 5 + 2 + 1]) + lines[1 + 5 + 3][:20]
    (tmp_path / "cut/context_lengths.jsonl").write_text(cut)
    numbers_read = []
    read = Reader.read

    def count(reader, state, tokens_Bn, *, learn, bar=None):
        if bar is not None:  # else it is a piece
            numbers_read.append(tokens_Bn.shape)
        return read(reader, state, tokens_Bn, learn=learn, bar=bar)

    monkeypatch.setattr(Reader, "read", count)
    caplog.set_level("INFO")
    resumed = evaluate(config, workdir, tmp_path / "cut", settings)
    assert resumed == whole
    assert numbers_read == [(2, 16)] * 4  # two batches, with and without learning
    assert (tmp_path / "cut/context_lengths.json").read_bytes() == (
        tmp_path / "whole/context_lengths.json"
    ).read_bytes()
    assert "going on after 8 finished records" in caplog.text
    numbers_read.clear()
    assert evaluate(config, workdir, tmp_path / "cut", settings) == whole
    assert numbers_read == []


def test_other_settings_begin_anew_and_say_so(config, workdir, settings, tmp_path, caplog):
    evaluate(config, workdir, tmp_path, settings)
    other = dataclasses.replace(settings, num_stretches=2)
    result = evaluate(config, workdir, tmp_path, other)
    assert "settings.num_stretches was 5, is 2): starting anew" in caplog.text
    assert result == evaluate(config, workdir, tmp_path / "afresh", other)
    assert json.loads((tmp_path / "context_lengths.json").read_text()) == result


def test_other_parameters_at_the_same_step_begin_anew(config, workdir, store_path, settings, tmp_path, caplog):
    other = make_run(tmp_path / "other", store_path, seed=1)
    evaluate(config, workdir, tmp_path / "out", settings)
    evaluate(config, other, tmp_path / "out", settings)
    assert re.search("parameters was '.*', is '.*'.: starting anew", caplog.text)


def test_a_file_that_is_none_of_ours_is_replaced(config, workdir, settings, tmp_path, caplog):
    (tmp_path / "context_lengths.jsonl").write_text("[1]\n{}\n")
    result = evaluate(config, workdir, tmp_path, settings)
    assert result["num_stretches"] == 5


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_and_writes_the_same(run, workdir, tmp_path):
    flags = ("--context_lengths=16,8", "--scored_tokens=4", "--num_stretches=2")
    code, out, _ = run("evaluate", f"--workdir={workdir}", f"--output={tmp_path / 'out'}", *flags)
    assert code == 0
    written = json.loads((tmp_path / "out/context_lengths.json").read_text())
    printed = json.loads(out)["context_lengths"]
    assert printed == {name: value for name, value in written.items() if name != "about"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "context_lengths.json",
        "context_lengths.jsonl",
    ]


BAD_INPUT = {
    "--context_lengths=8,x": "--context_lengths=8,x: it takes integers",
    "--context_lengths=0,8": r"context_lengths is \[0, 8\]",
    "--context_lengths=8,4000": "context_lengths has 4000, but split val of .* has 2016 tokens: .* at most 2015",
    "--context_lengths=8,16 --scored_tokens=9": "scored_tokens is 9, .* at most the shortest, 8",
    "--context_lengths=8 --scored_tokens=-1": "scored_tokens is -1",
    "--context_lengths=8 --num_stretches=-1": "num_stretches is -1",
    "--scored_tokens=9": "--scored_tokens belongs to --context_lengths",
    "--context_lengths=8 --checkpoint=DIR/no": "checkpoint DIR/no does not exist",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(flags, check_refused):
    check_refused(flags, BAD_INPUT[flags])


def test_output_that_is_a_file_is_one_line(run, workdir, tmp_path):
    (tmp_path / "out").write_text("mine")
    code, _, lines = run("evaluate", f"--workdir={workdir}", f"--output={tmp_path / 'out'}", "--context_lengths=8")
    assert code == 2 and len(lines) == 1
    assert "out cannot be written" in lines[0]
