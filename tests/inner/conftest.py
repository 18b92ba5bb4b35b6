"""A tiny model that learns while it reads, in float64, and compiled programs that the tests of this room share."""

import jax
import numpy as np
import pytest

from tests.model.tiny import TinyModel, tiny_model
from ttt_e2e.inner import Reading, read_sequence

# Shapes: T sequence, b mini-batch, M mini-batches, V vocabulary.
T, b = 16, 4
M = T // b
BOS = 1
CLIP_NORM = 2.0  # so that some inner gradients are clipped and some are not
LEARNING_RATE = 0.3


def learning_model(*, inner=None, **fields) -> TinyModel:
    """One prefix block and two suffix blocks, window 6, unless `fields` say otherwise."""
    inner = {"mini_batch_size": b, "clip_norm": CLIP_NORM, **(inner or {})}
    return tiny_model(inner=inner, train={"seq_len": T}, **{"num_fast_blocks": 2, "sliding_window": 6, **fields})


def distinct_tokens(seed: int = 0) -> np.ndarray:
    """Tokens [T + 1], no two alike and none of them BOS."""
    return np.random.default_rng(seed).permutation(np.arange(2, 29))[: T + 1]


def read(model: TinyModel, params, tokens_T1, learning_rate) -> Reading:
    """Reads a sequence, with BOS masked, as the model's configuration says."""
    return read_sequence(
        model.graphdef,
        params["fast"],
        params["slow"],
        tokens_T1,
        inner=model.config.inner,
        learning_rate=learning_rate,
        bos_id=BOS,
    )


class Differentiated:
    """A model's reading and the gradient of a weighted sum of its losses: one program for all weights and rates."""

    def __init__(self, model: TinyModel):
        def objective(params, tokens_T1, learning_rate, loss_weight, nll_weight_T):
            reading = read(model, params, tokens_T1, learning_rate)
            return loss_weight * reading.loss + nll_weight_T @ reading.token_nll_T, reading

        self.model = model
        self._program = jax.jit(jax.value_and_grad(objective, has_aux=True))

    def __call__(self, params, tokens_T1, *, learning_rate=LEARNING_RATE, loss_weight=1.0, nll_weight_T=None):
        """(reading, gradient of loss_weight * loss + nll_weight_T . token_nll_T, which is the loss if not given)."""
        nll_weight_T = np.zeros(T) if nll_weight_T is None else nll_weight_T
        (_, reading), gradient = self._program(
            params, tokens_T1, np.float64(learning_rate), np.float64(loss_weight), nll_weight_T
        )
        return reading, gradient


@pytest.fixture(autouse=True)
def in_float64(float64):
    """Every test of this room claims exactness."""


def _differentiated(**inner):
    with jax.enable_x64(True):
        return Differentiated(learning_model(inner=inner))


@pytest.fixture(scope="session")
def reference():
    return _differentiated(gradient="reference")


@pytest.fixture(scope="session")
def reference_without_clip():
    return _differentiated(gradient="reference", clip_norm=0.0)


@pytest.fixture(scope="session")
def first_order():
    return _differentiated(gradient="first_order")
