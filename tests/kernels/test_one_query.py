"""Attention of a single query to keys in several arrays is dense attention to all of them joined."""

import jax.numpy as jnp
import numpy as np
import pytest

from ttt_e2e.kernels import window_attention
from ttt_e2e.kernels.one_query import Keys, attend_one

N, G, H = 6, 2, 4


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_empty", [0, 3, 5])  # 5: the first part has nothing to see
@pytest.mark.parametrize("window", [0, 4])
def test_parts_are_as_one(num_empty, window):
    sizes, random = (5, 3, 1), np.random.default_rng(0)
    S = sum(sizes)
    q_1NH, k_SGH, v_SGH = (jnp.asarray(random.normal(size=shape)) for shape in ((1, N, H), (S, G, H), (S, G, H)))
    place_S = np.arange(S)
    visible_S = (place_S >= num_empty) & (place_S >= (S - window if window else 0))
    ends = np.cumsum(sizes)[:-1]
    by_head = (np.split(a_SGH.swapaxes(0, 1), ends, axis=1) for a_SGH in (k_SGH, v_SGH))
    parts = [Keys(*part) for part in zip(*by_head, np.split(visible_S, ends))]
    expected_1NH = window_attention(q_1NH, k_SGH, v_SGH, window=window, num_empty=num_empty, backend="reference")
    np.testing.assert_allclose(attend_one(q_1NH[0], *parts), expected_1NH[0], rtol=1e-12)
