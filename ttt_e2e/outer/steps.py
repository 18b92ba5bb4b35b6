"""The compiled programs of the outer loop: one training step, one evaluation step.

Shapes: `B` batch, `A` accumulation steps, `T` sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.config import Config
from ttt_e2e.inner import Reading, inner_learning_rate, read_batch
from ttt_e2e.kernels.precision import matmul_precision
from ttt_e2e.model import Transformer
from ttt_e2e.model.parameters import split
from ttt_e2e.outer import policies, sharding
from ttt_e2e.outer.optimizer import gradient_norm, learning_rate_schedule


class TrainState(NamedTuple):
    """What a training step maps to its successor, and what a checkpoint holds."""

    params: Any  # {"fast": W_0, "slow": theta}, nested dicts of arrays
    optimizer: Any
    step: jax.Array  # number of updates made


def abstract_model(config: Config):
    """(graphdef, params): the model's static structure and the shapes of {"fast", "slow"}; computes nothing."""
    graphdef, fast, slow = split(nnx.eval_shape(lambda: Transformer(config.model, nnx.Rngs(0))))
    return graphdef, {"fast": fast, "slow": slow}


def init_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Fresh parameters and optimizer state. Pure: call it under `jit` to have it made in place."""
    _, fast, slow = split(Transformer(config.model, nnx.Rngs(config.train.seed)))
    params = {"fast": fast, "slow": slow}
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def make_train_step(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, state_shardings) -> Callable:
    """The compiled outer step: (state, tokens [B, T + 1]) -> (state, metrics). The state passed in is donated.

    metrics: scalars `loss`, `grad_norm` (before clipping), `learning_rate` and `inner_learning_rate` of this step.
    """
    graphdef, params = abstract_model(config)
    config = policies.for_training(config, graphdef, params, mesh)
    read = _reader(config, graphdef, mesh)
    rate_at = learning_rate_schedule(config.optimizer)

    def loss(params, tokens, inner_rate):
        return read(params, tokens, inner_rate).loss.mean()

    def train_step(state: TrainState, tokens):
        inner_rate = inner_learning_rate(config.inner, state.step)
        mean_loss, gradient = _accumulate(
            lambda part: jax.value_and_grad(loss)(state.params, part, inner_rate),
            tokens,
            config.train.accumulation_steps,
        )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": mean_loss,
            "grad_norm": gradient_norm(gradient),
            "learning_rate": rate_at(state.step),
            "inner_learning_rate": inner_rate,
        }
        return TrainState(params, optimizer_state, state.step + 1), metrics

    return jax.jit(
        train_step,
        in_shardings=(state_shardings, NamedSharding(mesh, sharding.BATCH)),
        out_shardings=(state_shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def make_eval_step(config: Config, mesh: Mesh, params_shardings) -> Callable:
    """The compiled evaluation: (params, tokens [B, T + 1], inner learning rate, n) -> (sums, token_nll [B, T]).

    sums over the first n sequences: `loss`, and of their unmasked targets `token_nll` and the number, `num_tokens`.
    Every process has them; the NLL of each token stays where its sequence was read.
    """
    read = _reader(policies.for_reading(config), abstract_model(config)[0], mesh)
    bos_id = config.data.bos_id

    @matmul_precision(config.model.compute_dtype)
    def eval_step(params, tokens, inner_rate, num_sequences):
        reading = read(params, tokens, inner_rate)
        counts_B = jnp.arange(len(tokens)) < num_sequences
        is_target = counts_B[:, None] & ((tokens[:, 1:] != bos_id) | (bos_id == 0))
        sums = {
            "loss": jnp.where(counts_B, reading.loss, 0).sum(),
            "token_nll": jnp.where(is_target, reading.token_nll_T, 0).sum(),
            "num_tokens": is_target.sum(),
        }
        return sums, reading.token_nll_T

    batch, everywhere = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, P())
    return jax.jit(
        eval_step,
        in_shardings=(params_shardings, batch, everywhere, everywhere),
        out_shardings=(everywhere, batch),
    )


def _reader(config: Config, graphdef, mesh: Mesh) -> Callable[..., Reading]:
    """(params, tokens [B, T + 1], inner learning rate) -> what reading them gives."""

    def read(params, tokens, inner_rate):
        fast = sharding.per_sequence(params["fast"], tokens.shape[0], mesh)
        options = {"inner": config.inner, "learning_rate": inner_rate, "bos_id": config.data.bos_id}
        batch_sharding = NamedSharding(mesh, sharding.BATCH)
        return read_batch(graphdef, fast, params["slow"], tokens, **options, batch_sharding=batch_sharding)

    return read


def _accumulate(function, tokens, num_parts: int):
    """Mean of `function` over `num_parts` parts of the batch, one after the other.

    Part a takes every num_parts-th row, so that each part is spread over the `data` axis as the batch is.
    """
    if num_parts == 1:
        return function(tokens)
    parts = jnp.moveaxis(tokens.reshape(-1, num_parts, tokens.shape[1]), 1, 0)
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, parts[0]))
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), total, parts)
    return jax.tree.map(lambda x: x / num_parts, total)
