"""Reading a sequence gives the numbers of the released implementation, and so does the meta-gradient.

Tolerances: both are float32 programs that add in different orders; they agree to about 4e-6 and 6e-6.
"""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from tests.parity.golden import CASES, load_case
from ttt_e2e.inner import read_sequence

# The production path on every case, and plain autodiff where there is an inner loop to differentiate through.
PATHS = [(name, "exact") for name in CASES] + [("e2e_tied", "reference"), ("e2e_untied", "reference")]


@pytest.fixture(scope="module", params=PATHS, ids="-".join)
def case(request):
    name, gradient = request.param
    case = load_case(name)
    # What "auto" means where memory is plentiful.
    inner = dataclasses.replace(case.config.inner, gradient=gradient, trajectory="store", remat="keep")
    return dataclasses.replace(case, config=dataclasses.replace(case.config, inner=inner))


@pytest.fixture(scope="module")
def readings_and_gradient(case):
    """Readings of all sequences, stacked, and the meta-gradient of the first."""
    inner = case.config.inner

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def read(params, tokens_T1):
        reading = read_sequence(
            case.graphdef,
            params["fast"],
            params["slow"],
            tokens_T1,
            inner=inner,
            learning_rate=inner.learning_rate,
            bos_id=case.config.data.bos_id,
        )
        return reading.loss, reading

    results = [read(case.params, tokens_T1) for tokens_T1 in case.tokens]
    readings = jax.tree.map(lambda *arrays: np.stack(arrays), *(reading for (_, reading), _ in results))
    return readings, results[0][1]


def test_token_nll(case, readings_and_gradient):
    readings, _ = readings_and_gradient
    np.testing.assert_allclose(readings.token_nll_T, case.expected["token_nll"], rtol=0, atol=1e-5)


def test_losses(case, readings_and_gradient):
    readings, _ = readings_and_gradient
    np.testing.assert_allclose(readings.mini_batch_loss_M, case.expected["mini_batch_loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(readings.loss, case.expected["loss"], rtol=0, atol=1e-5)


def test_meta_gradient(case, readings_and_gradient):
    _, gradient = readings_and_gradient
    errors = jax.tree.map(
        lambda ours, theirs: np.linalg.norm(ours - theirs) / np.linalg.norm(theirs), gradient, case.expected["gradient"]
    )
    too_large = {jax.tree_util.keystr(p): e for p, e in jax.tree_util.tree_leaves_with_path(errors) if not e < 1e-4}
    assert not too_large
