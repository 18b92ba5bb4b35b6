"""A small token store in the layout of the official release: empty attributes, several chunks."""

import numpy as np
import pytest

from ttt_e2e.data.store import TokenWriter, write_attributes


@pytest.fixture
def write_store(tmp_path):
    def write(name="store", vocab_size=1000, chunk_tokens=64, attributes=None, **splits):
        path = tmp_path / name
        for split, tokens in splits.items():
            writer = TokenWriter(path, split, vocab_size, chunk_tokens)
            writer.append(np.asarray(tokens))
            writer.close()
        write_attributes(path, attributes or {})
        return path

    return write
