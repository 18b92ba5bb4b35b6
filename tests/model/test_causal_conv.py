"""The causal convolution. Shapes: `T` positions, `C` channels, `W` width of the convolution."""

import numpy as np
import pytest

from ttt_e2e.model.causal_conv import causal_conv, last_inputs

T, C, W = 11, 3, 4


def naive(x_TC, weight_CW, dilation):
    """The equation, with zeros before the first position."""
    y_TC = np.zeros_like(x_TC)
    for t in range(T):
        for w in range(W):
            if (source := t - dilation * (W - 1 - w)) >= 0:
                y_TC[t] += weight_CW[:, w] * x_TC[source]
    return y_TC


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    return random.normal(size=(T, C)).astype(np.float32), random.normal(size=(C, W)).astype(np.float32)


@pytest.mark.parametrize("dilation", [1, 3])
def test_equals_the_equation(dilation, inputs):
    x_TC, weight_CW = inputs
    zeros = np.zeros(((W - 1) * dilation, C), np.float32)
    y_TC = causal_conv(x_TC, weight_CW, zeros, dilation=dilation)
    np.testing.assert_allclose(y_TC, naive(x_TC, weight_CW, dilation), atol=1e-6)
    reversed_TC = causal_conv(x_TC, weight_CW[:, ::-1], zeros, dilation=dilation)  # the wrong variant
    assert np.abs(reversed_TC - naive(x_TC, weight_CW, dilation)).max() > 0.1


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("sizes", [(5, 6), (1, 1, 2, 7), (10, 1)])
def test_pieces_equal_the_whole(sizes, dilation, inputs):
    x_TC, weight_CW = inputs
    before_PC, pieces, start = np.zeros(((W - 1) * dilation, C), np.float32), [], 0
    for size in sizes:
        piece_TC = x_TC[start : start + size]
        pieces.append(causal_conv(piece_TC, weight_CW, before_PC, dilation=dilation))
        padded_TC = np.concatenate([piece_TC, np.full((2, C), np.nan, np.float32)])
        after_PC = last_inputs(padded_TC, before_PC, count=size)
        np.testing.assert_array_equal(after_PC, last_inputs(piece_TC, before_PC))
        before_PC, start = after_PC, start + size
    np.testing.assert_allclose(np.concatenate(pieces), naive(x_TC, weight_CW, dilation), atol=1e-6)
