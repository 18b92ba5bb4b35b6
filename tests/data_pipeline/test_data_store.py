import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.data.store import TokenStore, TokenWriter, read_attributes, write_attributes
from ttt_e2e.errors import UserError


def foreign_array(path, split, shape, data_type, chunk=64):
    """An array as other programs write it: any type, Blosc-compressed, chunks of zeros not stored."""
    metadata = {
        "shape": shape,
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk] * len(shape)}},
        "codecs": [{"name": "bytes"}, {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 3}}],
    }
    kvstore = {"driver": "file", "path": f"{path}/{split}/"}
    return ts.open({"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}, create=True).result()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    blocks=st.lists(st.integers(0, 90), min_size=1, max_size=8),
    chunk_tokens=st.integers(1, 70),
    seq_len=st.integers(1, 40),
    vocab_size=st.sampled_from([3, 2**16, 2**16 + 1, 200_000]),
)
def test_what_is_written_is_read(tmp_path_factory, blocks, chunk_tokens, seq_len, vocab_size):
    path = tmp_path_factory.mktemp("store")
    generator = np.random.default_rng(0)
    blocks = [generator.integers(0, vocab_size, size) for size in blocks]
    tokens = np.concatenate(blocks)
    writer = TokenWriter(path, "train", vocab_size, chunk_tokens)
    for block in blocks:
        writer.append(block)
    writer.close()
    write_attributes(path, {"name": "é"})
    assert writer.num_tokens == len(tokens)
    if len(tokens) == 0:
        with pytest.raises(UserError, match="train: is empty"):
            TokenStore.open(path, "train")
        return
    store = TokenStore.open(path, "train")
    assert store.attributes == {"name": "é"} and store.num_tokens == len(tokens)
    if len(tokens) < seq_len + 1:
        with pytest.raises(UserError, match=rf"has {len(tokens)} tokens, .*legal: seq_len <= {len(tokens) - 1}"):
            store.num_sequences(seq_len)
        return
    count = store.num_sequences(seq_len)
    assert count * seq_len + 1 <= len(tokens) < (count + 1) * seq_len + 1
    indices = generator.permutation(count)
    read = store.sequences(indices, seq_len, vocab_size)
    assert read.dtype == np.int32 and read.shape == (count, seq_len + 1)
    start, stop = sorted(generator.integers(0, len(tokens) + 1, 2))
    np.testing.assert_array_equal(store.stretch(start, stop, vocab_size), tokens[start:stop])
    with pytest.raises(IndexError):
        store.stretch(0, len(tokens) + 1)
    for index, row in zip(indices, read):
        np.testing.assert_array_equal(row, tokens[index * seq_len : index * seq_len + seq_len + 1])
    for wrong in (-1, count):
        with pytest.raises(IndexError):
            store.sequences([wrong], seq_len)


def test_a_chunk_of_zeros_is_stored(write_store):
    store = TokenStore.open(write_store(train=np.zeros(300)), "train")
    assert not store.sequences(range(29), 10).any()


def test_reads_another_program_s_store(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 64, 513).astype(np.uint32)
    foreign_array(tmp_path, "val", [513], "uint32").write(tokens).result()
    write_attributes(tmp_path, {})
    store = TokenStore.open(tmp_path, "val")
    assert store.num_sequences(128) == 4 and store.tokenizer_spec == ""
    np.testing.assert_array_equal(store.sequences([3], 128, 64)[0], tokens[384:513])


def test_golden_store(tmp_path):
    golden = Path(__file__).parents[1] / "data/e2e_tied/tokens.zarr"
    shutil.copytree(golden, tmp_path / "tokens.zarr")
    for split in ("train", "val"):
        store = TokenStore.open(tmp_path / "tokens.zarr", split)
        assert store.sequences([0], store.num_tokens - 1).shape == (1, store.num_tokens)
        assert store.attributes == {}


def test_path_may_need_quoting_in_a_url(write_store):
    assert TokenStore.open(write_store("a b%20#?é", train=range(9)), "train").num_tokens == 9


def test_pickle_and_fingerprint(write_store):
    path = write_store(train=range(100), val=range(100), attributes={"digest": 1})
    store = TokenStore.open(path, "train")
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(store.sequences([1], 10), again.sequences([1], 10))
    assert store.fingerprint == again.fingerprint
    others = [
        TokenStore.open(path, "val"),
        TokenStore.open(write_store("other", train=range(100), attributes={"digest": 2}), "train"),
        TokenStore.open(write_store("longer", train=range(101), attributes={"digest": 1}), "train"),
    ]
    assert len({store.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_tokenizer_spec(write_store):
    for name, spec in (("bytes", "bytes"), ("tokenizer.model", "{}/tokenizer.model")):
        path = write_store(name, train=[1], attributes={"tokenizer": name})
        assert TokenStore.open(path, "train").tokenizer_spec == spec.format(path)


def test_missing(write_store, tmp_path):
    with pytest.raises(UserError, match=r"absent: no token store there .*legal: "):
        TokenStore.open(tmp_path / "absent", "train")
    with pytest.raises(UserError, match="nonsense://x: cannot be read"):
        TokenStore.open("nonsense://x", "train")
    path = write_store(train=[1], val=[2])
    with pytest.raises(UserError, match="no split 'validation'; it has train, val"):
        TokenStore.open(path, "validation")
    with pytest.raises(UserError, match=r"zarr.json: damaged metadata"):
        read_attributes(path / "train")  # an array, not a group
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: "):
        TokenStore.open(tmp_path / "file", "train")


@pytest.mark.parametrize(
    ("shape", "data_type", "found"),
    [([4, 4], "uint16", "2-D array of uint16"), ([16], "float32", "1-D array of float32"), ([16], "int32", "int32")],
)
def test_wrong_kind_of_array(shape, data_type, found, tmp_path):
    foreign_array(tmp_path, "train", shape, data_type)
    write_attributes(tmp_path, {})
    with pytest.raises(UserError, match=f"/train: is a .*{found}; legal: a 1-D array of uint8"):
        TokenStore.open(tmp_path, "train")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"zarr_format": 2, "node_type": "group"}'])
@pytest.mark.parametrize("file", ["zarr.json", "train/zarr.json"])
def test_damaged_metadata(file, content, write_store):
    path = write_store(train=range(10))
    (path / file).write_text(content)
    with pytest.raises(UserError, match="damaged metadata") as caught:
        TokenStore.open(path, "train")
    assert "\n" not in str(caught.value) and "tensorstore_spec" not in str(caught.value)


@pytest.mark.parametrize("writer", ["ours", "foreign"])
@pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "empty"])
def test_damaged_chunk(damage, writer, write_store, tmp_path):
    tokens = np.random.default_rng(0).integers(1, 1000, 300).astype(np.uint16)
    if writer == "ours":
        path = write_store(train=tokens)
    else:
        path = tmp_path
        foreign_array(path, "train", [300], "uint16").write(tokens).result()
        write_attributes(path, {})
    chunk = path / "train/c/2"
    data = chunk.read_bytes()
    if damage == "missing":
        chunk.unlink()
    else:
        chunk.write_bytes({"cut": data[: len(data) // 2], "garbage": b"garbage" * 10, "empty": b""}[damage])
    store = TokenStore.open(path, "train")
    np.testing.assert_array_equal(store.sequences([0], 100)[0], tokens[:101])
    with pytest.raises(UserError, match=r"/train: damaged data \(.*c/2.*copy or prepare the store again") as caught:
        store.sequences([0, 1], 100)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary(write_store, tmp_path):
    store = TokenStore.open(write_store(train=[5, 99, 7, 100, 8]), "train")
    store.sequences([0], 2, 100)
    with pytest.raises(UserError, match=r"/train: token id 100 is not below vocab_size 100"):
        store.sequences([0, 1], 2, 100)
    with pytest.raises(UserError, match="token id 7 is not below vocab_size 7"):
        TokenWriter(tmp_path / "new", "train", 7).append(np.array([7]))
    # An id that would turn negative as int32.
    foreign_array(tmp_path / "big", "train", [8], "uint64").write(np.array([2**31 + 1] * 8, np.uint64)).result()
    write_attributes(tmp_path / "big", {})
    with pytest.raises(UserError, match="token id 2147483649 is not below"):
        TokenStore.open(tmp_path / "big", "train").sequences([0], 4)


def test_writer_memory_is_bounded(tmp_path):
    """Full chunks are on disk before the writer is closed."""
    writer = TokenWriter(tmp_path, "train", 10, chunk_tokens=50)
    for _ in range(10):
        writer.append(np.ones(33))
    assert len(list((tmp_path / "train/c").iterdir())) == 330 // 50
    assert json.loads((tmp_path / "train/zarr.json").read_text())["shape"] == [300]
