"""Damaged token stores: each is refused in one line, or reads as the whole one does."""

import itertools
import json
import shutil
from contextlib import closing

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.integration.fuzzing import fuzz, mutate, mutations
from tests.tiny_run import tiny_run
from ttt_e2e.data.pipeline import evaluation_batches, training_batches
from ttt_e2e.data.store import TokenWriter, write_attributes
from ttt_e2e.errors import UserError
from ttt_e2e.train.batches import open_store

VOCABULARY, T, CHUNK = 31, 32, 100
SPLITS = {"train": 9, "val": 3}  # sequences
FILES = ("zarr.json", "train/zarr.json", "val/zarr.json", "train/c/0", "train/c/1", "train/c/2", "val/c/0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a store in order, and what is read from it."""
    path = tmp_path_factory.mktemp("whole") / "tokens"
    random, counts = np.random.default_rng(0), {}
    for split, num_sequences in SPLITS.items():
        writer = TokenWriter(path, split, VOCABULARY, chunk_tokens=CHUNK)
        writer.append(random.integers(1, VOCABULARY, num_sequences * T + 1))
        writer.close()
        counts[split] = writer.num_tokens
    write_attributes(path, {"bos_id": 1, "vocab_size": VOCABULARY, "tokenizer": "bytes", "num_tokens": counts})
    return path, read(path)


def read(path) -> dict[str, np.ndarray]:
    """Sequences of a store, read the way that `train` does: the first twelve, and three batches in another order."""
    config = tiny_run(path)
    made = {}
    for split in SPLITS:
        store = open_store(config, split)
        options = {"seq_len": T, "vocab_size": VOCABULARY}
        in_order = evaluation_batches(store, num_sequences=0, batch_size=4, **options)
        made[split] = np.concatenate([rows[:count] for rows, count in itertools.islice(in_order, 3)])
        with closing(
            training_batches(store, global_batch_size=3, seed=0, shuffle=True, prefetch=1, **options)
        ) as batches:
            made[f"{split}, shuffled"] = np.stack(list(itertools.islice(batches, 3)))
    return made


def check(mutation: tuple, whole, directory, *, foreign: bool = False) -> None:
    """A store of another program has no attributes; what its own metadata does not say, nobody knows."""
    path, intact = whole
    damaged = directory / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(path, damaged)
    if foreign:
        write_attributes(damaged, {})
    mutate(damaged, *mutation)
    try:
        found = read(damaged)
    except UserError as error:
        assert "\n" not in str(error) and str(damaged) in str(error)
        return
    for name, tokens in intact.items():
        if foreign:  # it may seem to be longer or shorter, which changes the order
            count = 0 if "shuffled" in name else min(len(tokens), len(found[name]))
            tokens, found[name] = tokens[:count], found[name][:count]
        np.testing.assert_array_equal(found[name], tokens, err_msg=name)


# ------------------------------------------------------------------------------------------------------- the tests
@fuzz(60)
@given(mutation=mutations(FILES, FILES[:3]))
@example(mutation=("json", "zarr.json", (0.25, [])))  # a vocabulary size that is no number
@example(mutation=("fill", "zarr.json", b"[" * 100_000))  # deeper than `json` goes
@example(mutation=("json", "train/zarr.json", (0, 0)))
def test_a_damaged_store_is_refused_in_one_line_or_reads_as_before(mutation, whole, tmp_path):
    check(mutation, whole, tmp_path)


@pytest.mark.slow
@fuzz(450)
@given(mutation=mutations(FILES, FILES[:3]))
def test_many_damaged_stores(mutation, whole, tmp_path):
    check(mutation, whole, tmp_path)


@pytest.mark.slow
@fuzz(100)
@given(mutation=mutations(FILES, FILES[:3]))
def test_damaged_stores_of_other_programs(mutation, whole, tmp_path):
    check(mutation, whole, tmp_path, foreign=True)


@pytest.mark.parametrize("shape", (100, 200, 300, 400))
def test_a_store_that_seems_shorter_or_longer_is_refused(shape, whole, tmp_path):
    """Every chunk is sound: only the number of tokens that `prepare` recorded tells."""
    damaged = shutil.copytree(whole[0], tmp_path / "damaged")
    metadata = json.loads((damaged / "train/zarr.json").read_text())
    (damaged / "train/zarr.json").write_text(json.dumps(metadata | {"shape": [shape]}))
    with pytest.raises(UserError, match=f"damaged/train: damaged metadata .it has {shape} tokens, .* says 289"):
        read(damaged)


@given(place=st.integers(0, SPLITS["train"] * T), token=st.integers(VOCABULARY, 2**16 - 1))
@fuzz(20)
def test_an_id_beyond_the_vocabulary_is_named(place, token, tmp_path):
    tokens = np.ones(SPLITS["train"] * T + 1, np.int64)
    tokens[place] = token
    path = tmp_path / "tokens"
    shutil.rmtree(path, ignore_errors=True)
    for split in SPLITS:
        writer = TokenWriter(path, split, 2**16, chunk_tokens=CHUNK)
        writer.append(tokens)
        writer.close()
    write_attributes(path, {"bos_id": 1})
    with pytest.raises(UserError, match=f"{path}/train: token id {token} is not below vocab_size {VOCABULARY}"):
        read(path)
