"""RMS normalisation."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttt_e2e.config import ModelConfig
from ttt_e2e.model.norm import RMSNorm

SIZE = 16


def norm_with(weight, **fields):
    norm = RMSNorm(SIZE, dataclasses.replace(ModelConfig(), **fields))
    norm.weight = nnx.Param(weight)
    return norm


def test_root_mean_square_becomes_the_weight(float64):
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(5, SIZE)), random.normal(size=SIZE)
    y = norm_with(jnp.asarray(weight), rms_norm_eps=1e-30)(jnp.asarray(x))
    np.testing.assert_allclose(np.sqrt(np.mean((y / weight) ** 2, axis=-1)), 1, rtol=1e-14)
    np.testing.assert_allclose(y / weight / x, np.broadcast_to(y[:, :1] / weight[0] / x[:, :1], x.shape), rtol=1e-13)


def test_scale_of_the_input_does_not_matter_until_eps_does(float64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=SIZE))
    norm = norm_with(jnp.ones(SIZE), rms_norm_eps=1e-6)
    np.testing.assert_allclose(norm(1e6 * x), norm(1e4 * x), rtol=1e-12)
    np.testing.assert_allclose(norm(1e-9 * x), 1e-9 * x / 1e-3, rtol=1e-10)
    np.testing.assert_array_equal(norm(0 * x), 0)


def test_starts_with_a_weight_of_one():
    np.testing.assert_array_equal(RMSNorm(SIZE, ModelConfig()).weight[...], 1)


def test_bfloat16_is_normalised_and_weighted_in_float32():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(50, SIZE)), jnp.bfloat16)
    norm = norm_with(jnp.asarray(random.normal(size=SIZE), jnp.float32))
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, norm(x.astype(jnp.float32)).astype(jnp.bfloat16))
