"""Which token stores a config goes with, mixtures of them, and the tokenizers that made them."""

import json

import numpy as np
import pytest

from tests.tiny_run import BOS, VOCABULARY, T, tiny_run
from ttt_e2e.data.store import TokenWriter, write_attributes
from ttt_e2e.errors import UserError
from ttt_e2e.runs.data_record import find_data_record
from ttt_e2e.runs.metrics import read_metrics
from ttt_e2e.train import loop
from ttt_e2e.train.batches import open_store


def write_store(path, seed=0, model=b"", **attributes):
    random = np.random.default_rng(seed)
    for split, num_sequences in (("train", 20), ("val", 6)):
        writer = TokenWriter(path, split, VOCABULARY)
        writer.append(random.integers(1, VOCABULARY, num_sequences * T + 1))
        writer.close()
    if model:
        (path / "tokenizer.json").write_bytes(model)
        attributes["tokenizer"] = "tokenizer.json"
    write_attributes(path, {"bos_id": BOS, "vocab_size": VOCABULARY} | attributes)
    return path


def opened(path, **data):
    return open_store(tiny_run(path, data={"path": str(path), "bos_id": BOS} | data), "train")


def test_a_tokenizer_is_known_by_its_file_wherever_it_lies(tmp_path):
    store = write_store(tmp_path / "store", model=b"one")
    for name, content in (("alike.json", b"one"), ("other.json", b"two")):
        (tmp_path / name).write_bytes(content)
    for alike in ("", "tokenizer.json", str(tmp_path / "alike.json")):
        assert opened(store, tokenizer=alike).num_tokens == 20 * T + 1
    for other in ("bytes", str(tmp_path / "other.json"), str(tmp_path / "absent.json")):
        with pytest.raises(UserError, match=r"config.data.tokenizer is .*store was prepared with 'tokenizer.json'"):
            opened(store, tokenizer=other)
    with pytest.raises(UserError, match=r"config.data.bos_id is 2, but token store .* was prepared with 1"):
        opened(store, bos_id=2)


def test_a_mixture_is_checked_as_a_store_is(tmp_path):
    first, second = (write_store(tmp_path / name, model=b"one") for name in "ab")
    mixture = f"{first}:0.5,{second}:0.5"
    assert opened(mixture).num_tokens == 2 * (20 * T + 1)
    with pytest.raises(UserError, match=r"config.data.bos_id is 2"):
        opened(mixture, bos_id=2)
    large = write_store(tmp_path / "large", vocab_size=VOCABULARY + 1)
    with pytest.raises(UserError, match=r"has the vocab_size 32, but .*a has 31"):
        opened(f"{first}:0.5,{large}:0.5")
    with pytest.raises(UserError, match=r"vocab_size is 31, but token store .*large:1 was prepared with 32"):
        opened(f"{large}:1")


def test_a_run_on_a_mixture_is_resumed_to_the_bit(tmp_path):
    stores = [write_store(tmp_path / name, seed) for seed, name in enumerate("ab")]
    path = f"{stores[0]}:0.75,{stores[1]}:0.25"

    def run(workdir, num_steps, path=path):
        loop.train(
            tiny_run(
                path,
                train={"num_steps": num_steps},
                optimizer={"decay_steps": 4},
                checkpoint={"every_steps": 2},
                eval={"every_steps": 0},
            ),
            tmp_path / workdir,
        )
        lines = read_metrics(tmp_path / workdir / "metrics.jsonl")
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    whole = run("whole", 4)
    assert run("stopped", 2) == whole[:2]
    assert run("stopped", 4) == whole
    with pytest.raises(UserError, match="the run to resume has read one with"):
        run("stopped", 5, f"{stores[0]}:0.5,{stores[1]}:0.5")
    progress = json.loads((tmp_path / "whole/checkpoints/4/progress/metadata").read_text())
    assert progress["next_batch"] == 4
    assert find_data_record(tmp_path / "stopped").path == path  # not that which was refused
