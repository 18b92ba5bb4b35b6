"""A tiny run: a model that learns while it reads, on a token store of random text."""

import numpy as np
import pytest

from ttt_e2e.config import Config, from_config_dict
from ttt_e2e.data.store import TokenWriter

VOCABULARY, BOS, T, b = 31, 1, 32, 8


@pytest.fixture(scope="session")
def token_store(tmp_path_factory):
    """A token store of 40 sequences to train on and 6 held out."""
    path = tmp_path_factory.mktemp("store") / "tokens"
    random = np.random.default_rng(0)
    for split, num_sequences in (("train", 40), ("val", 6)):
        writer = TokenWriter(path, split, VOCABULARY)
        writer.append(random.integers(1, VOCABULARY, num_sequences * T + 1))
        writer.close()
    write_group(path)
    return path


def write_group(path) -> None:
    """Makes the splits below `path` a Zarr group."""
    from ttt_e2e.data.store import write_attributes

    write_attributes(path, {"bos_id": BOS, "vocab_size": VOCABULARY})


def tiny_run(token_store, **sections) -> Config:
    """One prefix and one suffix block, four mini-batches a sequence, eight sequences a batch, on one device."""
    fields = {
        "model": {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "sliding_window": 12,
            "num_fast_blocks": 1,
        },
        "inner": {"mini_batch_size": b, "learning_rate": 0.5, "warmup_steps": 3},
        "train": {"seq_len": T, "global_batch_size": 8, "num_steps": 6},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "data": {"path": str(token_store), "bos_id": BOS},
        "mesh": {"data": 1},
        "checkpoint": {"every_steps": 3},
        "log": {"every_steps": 1},
        "eval": {"every_steps": 3, "batch_size": 4, "num_sequences": 6},
    }
    for section, values in sections.items():
        fields[section] = fields[section] | values
    return from_config_dict(fields)
