"""Six outer steps give the losses, gradient norms and parameters of the released implementation."""

import jax
import numpy as np
import pytest

from tests.parity.golden import NUM_OUTER_STEPS, TRAINED_CASES, load_case
from ttt_e2e.cluster.mesh import make_mesh, shardings
from ttt_e2e.config import MeshConfig
from ttt_e2e.train.optimizers import make_optimizer
from ttt_e2e.train.steps import TrainState, make_train_step


@pytest.fixture(scope="module", params=TRAINED_CASES)
def trained(request):
    """A case, and the metrics and final parameters of training it."""
    case = load_case(request.param)
    mesh = make_mesh(MeshConfig(data=1))
    optimizer = make_optimizer(case.config.optimizer, case.params, case.config.model)
    state = TrainState(case.params, optimizer.init(case.params), np.int32(0))
    placed = shardings(state, mesh, case.config.model)
    state = jax.device_put(state, placed)
    train_step = make_train_step(case.config, optimizer, mesh, placed)
    metrics = []
    for step in range(NUM_OUTER_STEPS):
        state, step_metrics = train_step(state, case.batch(step))
        metrics.append(jax.device_get(step_metrics))
    return case, metrics, jax.device_get(state.params)


def test_losses_and_gradient_norms(trained):
    case, metrics, _ = trained
    np.testing.assert_allclose([m["loss"] for m in metrics], case.expected["train_loss"], rtol=5e-5)
    np.testing.assert_allclose([m["grad_norm"] for m in metrics], case.expected["train_grad_norm"], rtol=5e-5)


def test_final_parameters(trained):
    case, _, params = trained
    errors = jax.tree.map(
        lambda ours, theirs: np.linalg.norm(ours - theirs) / np.linalg.norm(theirs),
        params,
        case.expected["final_params"],
    )
    too_large = {jax.tree_util.keystr(p): e for p, e in jax.tree_util.tree_leaves_with_path(errors) if not e < 1e-4}
    assert not too_large
