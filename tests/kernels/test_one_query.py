"""Attention of a single query to keys in several arrays is dense attention to all of them joined."""

import jax.numpy as jnp
import numpy as np
import pytest

from ttt_e2e.kernels import window_attention
from ttt_e2e.kernels.attention.one_query import Keys, attend_one

N, G, H = 6, 2, 4


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_empty", [0, 3, 5])  # 5: the first part has nothing to see
@pytest.mark.parametrize("window", [0, 4])
def test_parts_are_as_one(num_empty, window):
    sizes, random = (5, 3, 1), np.random.default_rng(0)
    S = sum(sizes)
    q_N1H, k_GSH, v_GSH = (jnp.asarray(random.normal(size=shape)) for shape in ((N, 1, H), (G, S, H), (G, S, H)))
    place_S = np.arange(S)
    visible_S = (place_S >= num_empty) & (place_S >= (S - window if window else 0))
    ends = np.cumsum(sizes)[:-1]
    split = (np.split(a_GSH, ends, axis=1) for a_GSH in (k_GSH, v_GSH))
    parts = [Keys(*part) for part in zip(*split, np.split(visible_S, ends))]
    options = {"window": window, "num_empty": num_empty, "with_lse": True, "backend": "reference"}
    expected_N1H, expected_N1 = window_attention(q_N1H, k_GSH, v_GSH, **options)
    out_NH, lse_N = attend_one(q_N1H[:, 0], *parts)
    np.testing.assert_allclose(out_NH, expected_N1H[:, 0], rtol=1e-12)
    np.testing.assert_allclose(lse_N, expected_N1[:, 0], rtol=1e-12)
