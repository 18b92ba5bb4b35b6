import itertools
import pickle

import numpy as np
import pytest

from ttt_e2e.data.mixture import Mixture, members, open_tokens, recorded_tokenizer
from ttt_e2e.data.pipeline import evaluation_batches, training_batches
from ttt_e2e.data.store import TokenStore
from ttt_e2e.errors import UserError

SEQ_LEN = 8
SIZES = {"a": 23, "b": 9, "c": 31}  # sequences


@pytest.fixture
def directory(write_store, tmp_path):
    """Stores whose first token of a sequence tells the store and the number of the sequence in it."""
    for number, (name, size) in enumerate(SIZES.items()):
        write_store(name, train=1000 * number + np.arange(size * SEQ_LEN + 1), vocab_size=5000)
    return tmp_path


def mixture(directory, spec):
    path = ",".join(f"{directory}/{member}" for member in spec.split(","))
    return open_tokens(path, "train")


def take(count, store, **arguments):
    defaults = dict(seq_len=SEQ_LEN, global_batch_size=4, seed=1, shuffle=True, vocab_size=5000, prefetch=2)
    batches = training_batches(store, **defaults | arguments)
    try:
        return np.stack(list(itertools.islice(batches, count)))
    finally:
        batches.close()


def origins(batches):
    """Store and number of each sequence, in the order of training; checks that each row is the whole sequence."""
    rows = batches.reshape(-1, SEQ_LEN + 1)
    np.testing.assert_array_equal(rows - rows[:, :1], np.tile(np.arange(SEQ_LEN + 1), (len(rows), 1)))
    return rows[:, 0] // 1000, rows[:, 0] % 1000 // SEQ_LEN


@pytest.mark.parametrize(("spec", "shares"), [("a:0.75,b:0.25", [0.75, 0.25]), ("a:5,b:1,c:2", [0.625, 0.125, 0.25])])
def test_proportions_and_epochs(spec, shares, directory):
    stores, numbers = origins(take(100, mixture(directory, spec)))
    counts = [np.cumsum(stores == store) for store in range(len(shares))]
    for share, count in zip(shares, counts):  # at any time, not only in the end
        assert np.abs(count - share * np.arange(1, 401)).max() < len(shares)
    for store, size in enumerate(list(SIZES.values())[: len(shares)]):
        ours = numbers[stores == store]
        epochs = [ours[at : at + size] for at in range(0, len(ours) - size + 1, size)]
        assert len(epochs) > 1 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_restart_rows_and_workers_change_nothing(directory):
    mixed = mixture(directory, "a:0.7,b:0.3")
    whole = take(30, mixed)
    for start in (0, 1, 13, 29):
        np.testing.assert_array_equal(take(30 - start, mixed, start_batch=start), whole[start:])
    halves = [take(30, mixed, rows=rows) for rows in (slice(0, 2), np.array([2, 3]))]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)
    np.testing.assert_array_equal(take(9, mixed, num_workers=2, start_batch=2), whole[2:11])
    assert (take(30, mixed, seed=2) != whole).any()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_mixture_of_one_store_is_that_store(shuffle, directory):
    alone = TokenStore.open(directory / "a", "train")
    np.testing.assert_array_equal(
        take(20, mixture(directory, "a:1"), shuffle=shuffle), take(20, alone, shuffle=shuffle)
    )


def test_evaluation_is_of_the_mixture_until_a_store_ends(directory):
    mixed = mixture(directory, "a:0.75,b:0.25")
    available = mixed.num_sequences(SEQ_LEN)
    assert available == 30  # 23 of a last for 30
    batches = list(evaluation_batches(mixed, seq_len=SEQ_LEN, num_sequences=0, batch_size=7, vocab_size=5000))
    rows = np.concatenate([batch[:count] for batch, count in batches])
    stores, numbers = origins(rows)
    for store, expected in enumerate((range(23), range(7))):
        np.testing.assert_array_equal(numbers[stores == store], expected)
    np.testing.assert_array_equal(mixed.sequences(range(available), SEQ_LEN), rows)
    with pytest.raises(IndexError):
        mixed.sequences([available], SEQ_LEN)


def test_tokens_are_those_of_the_stores_one_after_the_other(directory):
    mixed = mixture(directory, "c:1,b:3")
    tokens = np.concatenate(
        [1000 * number + np.arange(SIZES[name] * SEQ_LEN + 1) for number, name in ((2, "c"), (1, "b"))]
    )
    assert mixed.num_tokens == len(tokens)
    for start, stop in ((0, len(tokens)), (240, 260), (249, 249), (300, 301)):
        np.testing.assert_array_equal(mixed.stretch(start, stop, 5000), tokens[start:stop])
    with pytest.raises(IndexError):
        mixed.stretch(0, len(tokens) + 1)


def test_fingerprint_and_pickle(directory):
    mixed = mixture(directory, "a:0.7,b:0.3")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(mixed)).stretch(0, 9), mixed.stretch(0, 9))
    others = [mixture(directory, spec) for spec in ("a:0.7,b:0.2", "b:0.7,a:0.3", "a:1", "a:0.7,c:0.3")]
    assert len({mixed.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert mixture(directory, "a:0.7,b:0.3").fingerprint == mixed.fingerprint


def test_members():
    assert members("a:0.7, b/c:3e-1,gs://d/e:1") == [("a", 0.7), ("b/c", 0.3), ("gs://d/e", 1.0)]
    for single in ("a", "gs://bucket/store", "a,b", "data/x:y"):
        assert members(single) == []
    for wrong in ("a:0.7,b", "a:0.7,b:", "a:0.7,b:0", "a:-1", "a:0.7,b:1.2.3", "a:1,", "a:1e999"):
        with pytest.raises(UserError, match=r"config.data.path .* has no weight above 0; legal: STORE:0.7,STORE:0.3"):
            members(wrong)


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [("tokenizer", "bytes", "tokenizer.model"), ("vocab_size", 257, 300), ("bos_id", 256, 1)],
)
def test_stores_of_different_tokenizers(name, ours, theirs, write_store):
    paths = [write_store(f"{value}", train=range(20), attributes={name: value}) for value in (ours, theirs)]
    with pytest.raises(UserError, match=f"has the {name} {theirs!r}, but .* has {ours!r}; legal: stores made with one"):
        open_tokens(f"{paths[0]}:1,{paths[1]}:1", "train")


def test_stores_of_different_models_of_one_name(write_store):
    attributes = {"tokenizer": "tokenizer.model", "vocab_size": 300, "bos_id": 1}
    paths = [write_store(name, train=range(20), attributes=attributes) for name in ("one", "two", "three")]
    for path, content in zip(paths, (b"model", b"other model", b"model")):
        (path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="has the digest of the tokenizer '") as caught:
        open_tokens(f"{paths[0]}:1,{paths[1]}:1", "train")
    assert "\n" not in str(caught.value)
    alike = open_tokens(f"{paths[0]}:1,{paths[2]}:1", "train")
    assert isinstance(alike, Mixture) and alike.attributes == attributes
    assert recorded_tokenizer(alike.path) == ("tokenizer.model", f"{paths[0]}/tokenizer.model")
    (paths[2] / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"three/tokenizer.model: cannot be read"):
        open_tokens(alike.path, "train")


def test_a_store_that_is_missing_or_too_small(directory, write_store):
    with pytest.raises(UserError, match="absent: no token store there"):
        mixture(directory, "a:0.7,absent:0.3")
    write_store("small", train=range(5))
    with pytest.raises(UserError, match=r"small/train: has 5 tokens, a sequence takes seq_len \+ 1 = 9"):
        mixture(directory, "a:0.7,small:0.3").num_sequences(SEQ_LEN)
