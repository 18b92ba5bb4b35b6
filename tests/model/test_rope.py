"""Rotary position embedding. Shapes: `T` positions, `N` heads, `H` head width."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_e2e.model.rope import absolute_angles, rotate, rotate_by

T, N, H = 7, 2, 8
THETA = 10_000.0
STYLES = ("interleaved", "half")

pytestmark = pytest.mark.usefixtures("float64")


def random_heads(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(N, T, H)))


def rotated(x_NTH, style, start=0):
    return rotate(x_NTH, start + jnp.arange(T), theta=THETA, style=style)


@pytest.mark.parametrize("style", STYLES)
@given(start=st.integers(0, 100_000))
def test_scores_depend_on_differences_of_position_only(style, start):
    q_NTH, k_NTH = random_heads(0), random_heads(1)

    def scores(start):
        return jnp.einsum("nth,nsh->nts", rotated(q_NTH, style, start), rotated(k_NTH, style, start))

    # Float64 angles of about 1e5 are wrong by 1e-11.
    np.testing.assert_allclose(scores(start), scores(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("style", STYLES)
def test_scores_do_depend_on_differences_of_position(style):
    x_NTH = jnp.ones((N, T, H))
    scores_T = jnp.einsum("nh,nsh->ns", rotated(x_NTH, style)[:, 0], rotated(x_NTH, style))[0]
    assert len(np.unique(np.round(scores_T, 6))) == T


@pytest.mark.parametrize("style", STYLES)
def test_norms_are_preserved(style):
    x_NTH = random_heads()
    norms_NT = jnp.linalg.norm(rotated(x_NTH, style, start=1000), axis=-1)
    np.testing.assert_allclose(norms_NT, jnp.linalg.norm(x_NTH, axis=-1), rtol=1e-14)


@pytest.mark.parametrize("style", STYLES)
def test_position_0_is_left_alone(style):
    x_NTH = random_heads()
    at_0 = rotate(x_NTH, jnp.zeros(T, int), theta=THETA, style=style)
    np.testing.assert_array_equal(at_0, x_NTH)


def test_styles_are_equal_up_to_the_order_of_channels():
    x_NTH = random_heads()
    to_half = np.concatenate([np.arange(0, H, 2), np.arange(1, H, 2)])
    interleaved, half = rotated(x_NTH, "interleaved"), rotated(x_NTH[..., to_half], "half")
    np.testing.assert_allclose(interleaved[..., to_half], half, rtol=1e-14)


def test_first_pair_turns_by_one_radian_a_position_and_the_next_by_a_power_of_theta():
    x_NTH = jnp.zeros((N, T, H)).at[..., 0].set(1).at[..., 2].set(1)
    t = np.arange(T)
    expected = np.stack([np.cos(t), np.sin(t), np.cos(t * THETA**-0.25), np.sin(t * THETA**-0.25)], axis=-1)
    np.testing.assert_allclose(rotated(x_NTH, "interleaved")[0, :, :4], expected, rtol=0, atol=1e-15)


def test_bfloat16_is_rotated_in_float32():
    """Position 257 is 256 in bfloat16, an error of one radian."""
    x_NTH = random_heads().astype(jnp.bfloat16)
    narrow = rotate(x_NTH, 257 + jnp.arange(T), theta=THETA, style="interleaved")
    wide = rotate(x_NTH.astype(jnp.float32), 257 + jnp.arange(T), theta=THETA, style="interleaved")
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("style", STYLES)
@given(start=st.integers(0, 2**31 - 1 - T))
def test_absolute_angles_are_exact_to_a_fraction_of_a_turn(style, start):
    """At position p they are off by 2^-33 p turns at most; so is the reference, of 53 bits, by less."""
    x_NTH, positions_T = random_heads(), start + np.arange(T)
    for dtype, rounding in ((jnp.float64, 1e-6), (jnp.float32, 1e-5)):
        angles_TC = absolute_angles(jnp.asarray(positions_T), H, theta=THETA, dtype=dtype)
        expected_NTH = rotate(x_NTH, jnp.asarray(positions_T), theta=THETA, style=style)
        tolerance = 4 * (2 * np.pi * 2**-33 * start + rounding)
        np.testing.assert_allclose(rotate_by(x_NTH, angles_TC, style=style), expected_NTH, rtol=0, atol=tolerance)


def test_float32_positions_would_be_off_by_more():
    position = jnp.asarray([2**21 - 1])
    exact_C = np.exp(1j * np.asarray(position) * THETA ** (-np.arange(0, H, 2) / H))
    angles_C = np.asarray(absolute_angles(position, H, theta=THETA, dtype=jnp.float32))[0]
    assert np.max(np.abs(np.exp(1j * angles_C) - exact_C)) < 2e-3
    naive_C = np.float32(position) * np.float32(THETA) ** np.float32(-np.arange(0, H, 2) / H)
    assert np.max(np.abs(np.exp(1j * naive_C) - exact_C)) > 8e-3
