"""Rules of both forms, a tensor for each block and one for all of them, transposed or not: read by parts, they fit."""

import numpy as np
import pytest

from ttt_e2e.config import from_config_dict
from ttt_e2e.interop.rules import Rule, sources_of, tensor_shapes, unknown

# Blocks 0 to 7 are window, attention, window, ...; the last four are fast.
STACKS = {"prefix_0": [0, 2], "prefix_1": [1, 3], "suffix_0": [4, 6], "suffix_1": [5, 7]}
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 8, "num_attention_heads": 2}
MODEL = from_config_dict(
    {"model": SIZES | {"mixer": "window,attention", "sliding_window": 4, "num_fast_blocks": 4}}
).model
D, F = MODEL.hidden_size, MODEL.intermediate_size
EMBEDDING = Rule("embedding", "embedding", transposed=True)


def blocks_of(tensors: dict, rule: Rule, blocks) -> dict:
    """{tensor: its array}, of a tensor for each block, or of one, in which all of these blocks are."""
    if "{block}" in rule.theirs:
        return {rule.theirs.format(block=i): tensors[i] for i in blocks}
    return {rule.theirs: np.stack([tensors[i] for i in blocks])}


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("theirs", ("layers.{block}.gate", "layers.gate"))
@pytest.mark.parametrize(("ours", "blocks"), (("mlp.w1", range(8)), ("fast_mlp.w1", range(4, 8))))
def test_a_parameter_of_blocks_is_read_from_theirs(ours, blocks, theirs, transposed):
    rule = Rule(ours, theirs, transposed)
    sources = sources_of(MODEL, (rule, EMBEDDING))
    matrices = np.random.default_rng(0).normal(size=(8, D, F)).astype(np.float32)
    files = blocks_of(dict(enumerate(matrices.swapaxes(1, 2) if transposed else matrices)), rule, blocks)
    shapes = tensor_shapes(MODEL, sources)
    assert shapes.pop("embedding") == (D, MODEL.vocab_size)
    assert shapes == {name: array.shape for name, array in files.items()}
    found = {name: source for name, source in sources.items() if name.endswith(f".{ours}")}
    kind = "fast" if ours.startswith("fast") else "slow"
    assert found.keys() == {f"{kind}.{stack}.{ours}" for stack, of in STACKS.items() if set(of) <= set(blocks)}
    for name, source in found.items():
        index = (slice(None), slice(2, 4), slice(5, 11))
        part = source.read(lambda name, index: files[name][index], index, np.float32)
        np.testing.assert_array_equal(part, matrices[STACKS[name.split(".")[1]]][index])


def test_parameters_without_a_rule_are_listed():
    names = unknown(MODEL, sources_of(MODEL, (Rule("mlp.w1", "gate"),)))
    assert "slow.embedding" in names and "fast.suffix_0.fast_mlp.w1" in names and "slow.prefix_0.mlp.w2" in names
    assert not any(name.endswith(".mlp.w1") for name in names)
