import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.data.pipeline import evaluation_batches, training_batches
from ttt_e2e.data.store import TokenStore
from ttt_e2e.errors import UserError

SEQ_LEN = 8
VOCAB_SIZE = 1000


@pytest.fixture
def store(write_store):
    return store_of(write_store, 23)


def store_of(write_store, num_sequences, name="store"):
    """Token i of the store is i, so that the first token of a sequence tells which sequence it is."""
    return TokenStore.open(write_store(name, train=np.arange(num_sequences * SEQ_LEN + 1)), "train")


def take(count, store, **arguments):
    defaults = dict(seq_len=SEQ_LEN, global_batch_size=4, seed=1, shuffle=True, vocab_size=VOCAB_SIZE, prefetch=2)
    batches = training_batches(store, **defaults | arguments)
    try:
        return np.stack(list(itertools.islice(batches, count)))
    finally:
        batches.close()


def numbers(batches):
    """Sequence numbers in the order of training; checks that each row is the whole sequence."""
    rows = batches.reshape(-1, SEQ_LEN + 1)
    np.testing.assert_array_equal(rows - rows[:, :1], np.tile(np.arange(SEQ_LEN + 1), (len(rows), 1)))
    return rows[:, 0] // SEQ_LEN


def test_each_epoch_visits_every_sequence_once_in_its_own_order(store):
    batches = take(3 * 23, store)
    assert batches.dtype == np.int32 and batches.shape == (3 * 23, 4, SEQ_LEN + 1)
    epochs = numbers(batches).reshape(-1, 23)
    for epoch in epochs:
        assert sorted(epoch) == list(range(23))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs) == 12
    assert tuple(numbers(take(6, store, seed=2))[:23]) != tuple(epochs[0])


def test_without_shuffle_the_order_is_that_of_the_store(store):
    np.testing.assert_array_equal(numbers(take(12, store, shuffle=False)), np.arange(48) % 23)


def test_restart_continues_the_uninterrupted_order(write_store, tmp_path_factory):
    names = map(str, itertools.count())

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(
        num_sequences=st.integers(1, 30),
        global_batch_size=st.integers(1, 7),
        start=st.integers(0, 25),
        shuffle=st.booleans(),
        prefetch=st.integers(1, 5),
    )
    def check(num_sequences, global_batch_size, start, shuffle, prefetch):
        store = store_of(write_store, num_sequences, next(names))
        arguments = dict(global_batch_size=global_batch_size, shuffle=shuffle)
        whole = take(start + 8, store, **arguments)
        np.testing.assert_array_equal(take(8, store, start_batch=start, prefetch=prefetch, **arguments), whole[start:])

    check()


def test_rows_of_two_processes_make_up_the_batch_of_one(store):
    whole = take(12, store)
    halves = [take(12, store, rows=rows) for rows in (slice(0, 2), np.array([2, 3]))]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)


def test_worker_processes_change_nothing(store):
    arguments = dict(start_batch=2, rows=slice(1, 3))
    np.testing.assert_array_equal(take(9, store, num_workers=2, **arguments), take(9, store, **arguments))


def test_reads_only_its_rows_and_not_far_ahead(store, monkeypatch):
    read = []
    original = TokenStore.sequences

    def sequences(self, indices, *arguments):
        read.append(len(indices))
        return original(self, indices, *arguments)

    monkeypatch.setattr(TokenStore, "sequences", sequences)
    take(10, store, rows=slice(2, 4), prefetch=2)
    assert set(read) == {2} and len(read) <= 10 + 2 + 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_surfaces_as_user_error(num_workers, write_store):
    path = write_store(train=np.arange(800), chunk_tokens=80)
    (path / "train/c/5").unlink()
    store = TokenStore.open(path, "train")
    with pytest.raises(UserError, match=r"/train: damaged data \(.*c/5"):
        take(24, store, shuffle=False, num_workers=num_workers)
    assert len(take(12, store, shuffle=False)) == 12  # 12 batches of 4 sequences of 8 tokens end before chunk 5


def test_ids_beyond_the_vocabulary_surface_as_user_error(store):
    with pytest.raises(UserError, match=r"token id .* is not below vocab_size 100"):
        take(6, store, vocab_size=100)


def test_store_too_small_and_bad_seed(store):
    with pytest.raises(UserError, match=r"has 185 tokens, .* seq_len \+ 1 = 1001"):
        training_batches(store, seq_len=1000, global_batch_size=1, seed=0, shuffle=True, vocab_size=10)
    with pytest.raises(UserError, match=r"data.seed -1: legal: 0 to"):
        take(1, store, seed=-1)


def evaluate(store, **arguments):
    return list(evaluation_batches(store, **dict(seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE) | arguments))


@pytest.mark.parametrize("num_sequences", [0, 1, 7, 8, 23])
@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_evaluation_visits_the_first_sequences_in_order(num_sequences, batch_size, store):
    batches = evaluate(store, num_sequences=num_sequences, batch_size=batch_size)
    assert all(batch.shape == (batch_size, SEQ_LEN + 1) and batch.dtype == np.int32 for batch, _ in batches)
    counted = np.concatenate([batch[:num_valid] for batch, num_valid in batches])
    np.testing.assert_array_equal(numbers(counted), np.arange(num_sequences or 23))
    last, num_valid = batches[-1]
    np.testing.assert_array_equal(last[num_valid:], np.tile(last[num_valid - 1], (batch_size - num_valid, 1)))


def test_evaluation_by_rows(store):
    whole = evaluate(store, num_sequences=0, batch_size=4)
    parts = [evaluate(store, num_sequences=0, batch_size=4, rows=rows) for rows in (slice(0, 1), slice(1, 4))]
    for (batch, num_valid), (first, n), (second, m) in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate([first, second]), batch)
        assert n == m == num_valid


def test_evaluation_refuses(store):
    for number in (-1, 24):
        with pytest.raises(UserError, match=rf"eval.num_sequences {number}: .* has 23 sequences .* legal: 0 \(all\)"):
            evaluate(store, num_sequences=number, batch_size=4)
    with pytest.raises(UserError, match="vocab_size 20"):
        evaluate(store, num_sequences=0, batch_size=4, vocab_size=20)
