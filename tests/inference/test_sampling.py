"""Sampling against naive references in NumPy, one token at a time."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.errors import UserError
from ttt_e2e.inference.sampling import adjust, choose
from ttt_e2e.inference.settings import Sampling

V = 12
logits = st.lists(st.floats(-8, 8, width=16), min_size=V, max_size=V, unique=True).map(np.float32)
seen = st.lists(st.booleans(), min_size=V, max_size=V).map(np.array)
adjusted = jax.jit(adjust, static_argnames="sampling")


def naive_adjust(logits_V, seen_V, sampling: Sampling):
    """Probabilities, by loops over the sorted vocabulary."""
    values = [float(x) for x in logits_V]
    for i in range(V):
        if seen_V[i]:
            values[i] *= 1 / sampling.repetition_penalty if values[i] > 0 else sampling.repetition_penalty
    values = [x / sampling.temperature for x in values]
    order = sorted(range(V), key=lambda i: -values[i])
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = {i: np.exp(values[i] - values[order[0]]) for i in order}
    kept, total = {}, 0.0
    for i in order:
        if total < sampling.top_p * sum(weights.values()):
            kept[i] = weights[i]
        total += weights[i]
    return np.array([kept.get(i, 0) / sum(kept.values()) for i in range(V)])


@settings(max_examples=20)
@given(logits_V=logits, seen_V=seen)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.3, repetition_penalty=1.7),
        Sampling(top_k=4),
        Sampling(top_p=0.71, temperature=1.3),
        Sampling(top_k=5, top_p=0.43, repetition_penalty=1.2),
    ],
    ids=str,
)
def test_equals_the_naive_distribution(sampling, logits_V, seen_V):
    expected = naive_adjust(logits_V, seen_V, sampling)
    result = np.asarray(jax.nn.softmax(adjusted(logits_V, seen_V, sampling)))
    if sampling.repetition_penalty == 1 or len(np.unique(expected[expected > 0])) == (expected > 0).sum():
        np.testing.assert_allclose(result, expected, atol=2e-5)


@given(logits_V=logits)
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=1e-6)], ids=str)
def test_only_the_likeliest_is_left(sampling, logits_V):
    keys_B, none_seen = jax.random.split(jax.random.key(0), 1), np.zeros((1, V), bool)
    assert choose(keys_B, 0, logits_V[None], none_seen, sampling)[0] == logits_V.argmax()


def test_drawn_as_often_as_the_distribution_says():
    B, logits_V = 20000, np.linspace(-1, 1, V, dtype=np.float32)
    keys_B = jax.random.split(jax.random.key(1), B)
    drawn = choose(keys_B, 3, np.tile(logits_V, (B, 1)), np.zeros((B, V), bool), Sampling(top_k=6))
    expected = naive_adjust(logits_V, np.zeros(V, bool), Sampling(top_k=6))
    # Five standard deviations of a frequency.
    np.testing.assert_allclose(np.bincount(drawn, minlength=V) / B, expected, atol=5 * 0.5 / B**0.5)


def test_sequences_are_independent_of_each_other_and_reproducible():
    B = 8
    keys_B, logits_BV = jax.random.split(jax.random.key(2), B), np.zeros((B, V), np.float32)
    seen_BV = np.zeros((B, V), bool)
    together = choose(keys_B, 5, logits_BV, seen_BV, Sampling())
    apart = [choose(keys_B[i : i + 1], 5, logits_BV[:1], seen_BV[:1], Sampling())[0] for i in range(B)]
    np.testing.assert_array_equal(together, apart)
    assert len(set(map(int, together))) > 1
    assert np.any(together != choose(keys_B, 6, logits_BV, seen_BV, Sampling()))


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
    ],
)
def test_what_means_nothing_is_refused(field, value):
    with pytest.raises(UserError, match=f"^{field} is {value}, but it must be [^\n]*$"):
        Sampling(**{field: value})
