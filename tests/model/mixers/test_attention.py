"""Attention and window attention: what they must have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.inner.conftest import distinct_tokens, learning_model, read

T = 16
HYBRID = "window,window,window,window,window,attention"


def losses(mixer: str, window: int, num_fast_blocks: int, weights=None):
    """(NLL [T] of a model of 12 blocks, its weights as one stack [12 or fewer, ...] a part)."""
    fields = {"num_hidden_layers": 12, "num_fast_blocks": num_fast_blocks, "sliding_window": window, "mixer": mixer}
    model = learning_model(inner={"learning_rate": 0.3}, **fields)
    params = model.params if weights is None else in_stacks(weights, mixer.count(",") + 1)
    assert jax.tree.structure(params) == jax.tree.structure(model.params)
    return read(model, params, distinct_tokens(), 0.3).token_nll_T, model.params


def in_stacks(tree, count: int):
    """Divides the stacks "prefix" and "suffix" of a tree into `count` stacks each, by turns."""
    if not isinstance(tree, dict) or count == 1:
        return tree
    new = {}
    for name, branch in tree.items():
        if name in ("prefix", "suffix"):
            new |= {f"{name}_{i}": jax.tree.map(lambda a, i=i: a[i::count], branch) for i in range(count)}
        else:
            new[name] = in_stacks(branch, count)
    return new


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_fast_blocks", [0, 6])
def test_a_window_of_the_whole_sequence_is_full_attention(num_fast_blocks):
    """The paper's column at 8K, where window, hybrid and full attention are one model."""
    expected_T, weights = losses("attention", 0, num_fast_blocks)
    for mixer in ("window", HYBRID):
        nll_T, _ = losses(mixer, T, num_fast_blocks, weights)
        np.testing.assert_allclose(nll_T, expected_T, rtol=1e-9)
    shorter_T, _ = losses(HYBRID, T // 2, num_fast_blocks, weights)  # the control
    np.testing.assert_allclose(shorter_T[: T // 2], expected_T[: T // 2], rtol=1e-9)
    assert jnp.abs(shorter_T - expected_T)[T // 2 :].max() > 1e-3
