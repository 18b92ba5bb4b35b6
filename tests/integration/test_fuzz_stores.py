"""Damaged token stores: each is refused in one line, or reads as the whole one does."""

import itertools
import json
import shutil
from contextlib import closing

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.integration.fuzzing import fuzz
from tests.outer.conftest import tiny_run
from ttt_e2e.data.pipeline import evaluation_batches, training_batches
from ttt_e2e.data.store import TokenWriter, write_attributes
from ttt_e2e.errors import UserError
from ttt_e2e.outer.batches import open_store

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


# ------------------------------------------------------------------------------------------------------- what is done
def places():
    """Where in a file, or in a JSON tree: a fraction of the way."""
    return st.floats(0, 1, exclude_max=True)


JUNK = (
    *(b"", b"{", b"{}", b"[]", b"null", b"0", b'""', b"\xff\xfe", b"\0" * 64, b"garbage" * 40, b"[" * 100_000),
    *(b'{"zarr_format": 3}', b'{"zarr_format": 2, "node_type": "group"}', b'{"zarr_format": 3, "node_type": "array"}'),
    *(b'{"zarr_format": 3, "node_type": "group", "attributes": 3}', b'{"zarr_format": NaN}', b'{"a": "\xc3"}'),
)
WORDS = ("", "x", "uint8", "uint16", "uint32", "uint64", "int32", "float32", "big", "gzip", "default", "bytes", "group")
NUMBERS = (0, 1, 2, 7, 31, 99, 100, 200, 256, 288, 290, 300, 321, 10**6, 2**31, 2**40, 2**62, 2**64, 10**30, -1)
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from(
        (None, True, False, 0.5, 1e300, float("nan"), float("inf"), [], {}, [[]], [1, 2], {"name": "x"}, [0])
    ),
    st.lists(st.sampled_from(NUMBERS), max_size=2),
)


def mutations():
    """(what is done, to which file, details)."""
    file, metadata = st.sampled_from(FILES), st.sampled_from(FILES[:3])
    return st.one_of(
        st.tuples(st.just("cut"), file, places()),
        st.tuples(st.just("extend"), file, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("flip"), file, st.tuples(places(), st.integers(0, 7))),
        st.tuples(st.just("flip"), metadata, st.tuples(places(), st.integers(0, 7))),
        st.tuples(st.just("fill"), file, st.one_of(st.sampled_from(JUNK), st.binary(max_size=60))),
        st.tuples(st.sampled_from(("delete", "directory", "loop", "rename")), file, st.none()),
        st.tuples(st.just("json"), metadata, st.tuples(places(), VALUES)),
        st.tuples(st.just("json"), metadata, st.tuples(places(), VALUES)),
        st.tuples(st.just("json"), metadata, st.tuples(places(), VALUES)),
        st.tuples(st.just("drop"), metadata, places()),
    )


def paths_of(tree, path=()):
    """The path of every value in a JSON tree but the whole."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths_of(value, (*path, key))


def change_json(content: bytes, place: float, change) -> bytes:
    """The JSON with one of its values changed: `change(holder, key)`."""
    tree = json.loads(content)
    paths = list(paths_of(tree))
    *path, key = paths[int(place * len(paths))]
    holder = tree
    for step in path:
        holder = holder[step]
    change(holder, key)
    return json.dumps(tree).encode()


def mutate(root, kind: str, name: str, details) -> None:
    """Does it to a file of the directory `root`."""
    file = root / name
    content = file.read_bytes()
    if kind == "cut":
        file.write_bytes(content[: int(details * len(content))])
    elif kind == "extend":
        file.write_bytes(content + details)
    elif kind == "flip":
        place = int(details[0] * len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << details[1]]) + content[place + 1 :])
    elif kind == "fill":
        file.write_bytes(details)
    elif kind == "json":
        file.write_bytes(change_json(content, details[0], lambda holder, key: holder.__setitem__(key, details[1])))
    elif kind == "drop":
        file.write_bytes(change_json(content, details, lambda holder, key: holder.__delitem__(key)))
    elif kind == "rename":
        file.rename(file.with_name(f"{file.name}.old"))
    else:
        file.unlink()
        if kind == "directory":
            file.mkdir()
        elif kind == "loop":
            file.symlink_to(file)


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
@given(mutation=mutations())
@example(mutation=("json", "zarr.json", (0.25, [])))  # a vocabulary size that is no number
@example(mutation=("fill", "zarr.json", b"[" * 100_000))  # deeper than `json` goes
@example(mutation=("json", "train/zarr.json", (0, 0)))
def test_a_damaged_store_is_refused_in_one_line_or_reads_as_before(mutation, whole, tmp_path):
    check(mutation, whole, tmp_path)


@pytest.mark.slow
@fuzz(450)
@given(mutation=mutations())
def test_many_damaged_stores(mutation, whole, tmp_path):
    check(mutation, whole, tmp_path)


@pytest.mark.slow
@fuzz(100)
@given(mutation=mutations())
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
