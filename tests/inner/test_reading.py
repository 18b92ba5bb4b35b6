"""Reading a sequence: what it gives. (test_meta_gradient.py: what differentiating it gives.)

Tolerances: both sides are float64 and add in different orders, through 3 blocks and up to 4 updates.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.inner.conftest import BOS, CLIP_NORM, LEARNING_RATE, M, T, b, distinct_tokens, learning_model, read
from tests.inner.naive_reading import naive_reading
from tests.model import naive

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def assert_same_reading(reading, expected):
    np.testing.assert_allclose(reading.token_nll_T, expected.token_nll_T, **EXACT)
    np.testing.assert_allclose(reading.mini_batch_loss_M, expected.mini_batch_loss_M, **EXACT)
    np.testing.assert_allclose(reading.loss, expected.loss, **EXACT)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, **EXACT), reading.fast, expected.fast)


def tokens_with_bos():
    """The targets of the second mini-batch are all BOS, and two of the third's."""
    tokens_T1 = distinct_tokens()
    tokens_T1[b + 1 : 2 * b + 1] = BOS
    tokens_T1[2 * b + 2 : 2 * b + 4] = BOS
    return tokens_T1


@pytest.mark.parametrize("make_tokens", [distinct_tokens, tokens_with_bos])
def test_scan_equals_a_loop_over_mini_batches(reference, make_tokens):
    model, tokens_T1 = reference.model, make_tokens()
    reading, _ = reference(model.params, tokens_T1)
    expected = naive_reading(
        model.params,
        model.config,
        tokens_T1,
        windows=[6] * 3,
        learning_rate=LEARNING_RATE,
        clip_norm=CLIP_NORM,
        bos_id=BOS,
    )
    assert min(expected.gradient_norm_M) < CLIP_NORM < max(expected.gradient_norm_M)  # both cases are here
    assert_same_reading(reading, expected)


def test_without_a_clip_too(reference_without_clip):
    model, tokens_T1 = reference_without_clip.model, distinct_tokens()
    reading, _ = reference_without_clip(model.params, tokens_T1)
    expected = naive_reading(
        model.params, model.config, tokens_T1, windows=[6] * 3, learning_rate=LEARNING_RATE, clip_norm=0, bos_id=BOS
    )
    assert max(expected.gradient_norm_M) > CLIP_NORM
    assert_same_reading(reading, expected)


@pytest.mark.parametrize(
    "windows, fields",
    [
        ([2] * 3, {"sliding_window": 2}),  # k < b
        ([8] * 3, {"sliding_window": 8}),  # k = 2 b
        ([T] * 3, {"sliding_window": T + 5}),  # k > T
        ([T] * 2, {"sliding_window": 0, "num_hidden_layers": 2}),  # full attention; no prefix
        ([4] * 2, {"sliding_window": 4, "num_hidden_layers": 2, "num_fast_blocks": 1, "post_norm": False}),  # k = b
        ([3, T] * 2, {"sliding_window": 3, "mixer": "window,attention", "num_hidden_layers": 4}),
        (  # the pattern fits neither prefix nor suffix
            [3, T, 3, 3],
            {
                "sliding_window": 3,
                "mixer": "window,attention,window,window",
                "num_hidden_layers": 4,
                "num_fast_blocks": 3,
            },
        ),
    ],
)
def test_every_window_and_arrangement_of_blocks_equals_the_loop(windows, fields):
    model, tokens_T1 = learning_model(**fields), distinct_tokens()
    reading = jax.jit(lambda params: read(model, params, tokens_T1, LEARNING_RATE))(model.params)
    expected = naive_reading(
        model.params,
        model.config,
        tokens_T1,
        windows=windows,
        learning_rate=LEARNING_RATE,
        clip_norm=CLIP_NORM,
        bos_id=BOS,
    )
    assert_same_reading(reading, expected)


def test_rate_0_equals_the_plain_model(reference):
    model, tokens_T1 = reference.model, distinct_tokens()
    reading, _ = reference(model.params, tokens_T1, learning_rate=0)
    plain_nll_T = naive.plain_nll(model.params, model.config.model, tokens_T1, windows=[6] * 3)
    np.testing.assert_allclose(reading.token_nll_T, plain_nll_T, **EXACT)
    jax.tree.map(np.testing.assert_array_equal, reading.fast, model.params["fast"])


def test_learning_changes_what_comes_after_the_first_mini_batch_only(reference):
    model, tokens_T1 = reference.model, distinct_tokens()
    learning, _ = reference(model.params, tokens_T1)
    static, _ = reference(model.params, tokens_T1, learning_rate=0)
    np.testing.assert_array_equal(learning.token_nll_T[:b], static.token_nll_T[:b])
    assert np.all(learning.token_nll_T[b:] != static.token_nll_T[b:])


def test_model_without_fast_weights_is_read_as_the_plain_model():
    model = learning_model(num_fast_blocks=0)
    tokens_T1 = tokens_with_bos()
    reading = jax.jit(lambda params: read(model, params, tokens_T1, LEARNING_RATE))(model.params)
    nll_T = naive.plain_nll(model.params, model.config.model, tokens_T1, windows=[6] * 3)
    np.testing.assert_allclose(reading.token_nll_T, nll_T, **EXACT)

    counts_Mb = (tokens_T1[1:] != BOS).reshape(M, b)
    nll_Mb = np.asarray(nll_T).reshape(M, b)
    loss_M = [nll_b[counts_b].mean() if counts_b.any() else 0 for nll_b, counts_b in zip(nll_Mb, counts_Mb)]
    np.testing.assert_allclose(reading.mini_batch_loss_M, loss_M, **EXACT)
    np.testing.assert_allclose(reading.loss, np.mean(loss_M), **EXACT)
    assert not jax.tree.leaves(reading.fast)


def test_fully_masked_mini_batches_teach_nothing(reference):
    model = reference.model
    reading, _ = reference(model.params, np.full(T + 1, BOS))
    np.testing.assert_array_equal(reading.mini_batch_loss_M, np.zeros(M))
    np.testing.assert_array_equal(reading.loss, 0)
    assert np.all(reading.token_nll_T > 0)  # unmasked
    jax.tree.map(np.testing.assert_array_equal, reading.fast, model.params["fast"])


def test_each_sequence_has_fast_weights_of_its_own(reference):
    model = reference.model
    tokens_BT1 = np.stack([distinct_tokens(seed) for seed in range(3)])
    together = jax.jit(jax.vmap(lambda params, tokens_T1: read(model, params, tokens_T1, LEARNING_RATE), (None, 0)))(
        model.params, tokens_BT1
    )
    apart = [reference(model.params, tokens_T1)[0] for tokens_T1 in tokens_BT1]
    jax.tree.map(lambda a, *e: np.testing.assert_allclose(a, np.stack(e), **EXACT), together, *apart)


def test_float32_fast_weights_stay_float32_under_bfloat16_compute():
    model = learning_model(compute_dtype="bfloat16", param_dtype="bfloat16")
    reading = jax.eval_shape(lambda params: read(model, params, distinct_tokens(), jnp.float32(1.0)), model.params)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(reading)}
    assert dtypes == {jnp.dtype(jnp.float32)}
