"""The compiled programs of the outer loop: one training step, one evaluation step.

Losses and gradients are computed inside of a `jax.shard_map` over both axes of the mesh: each device works on its own
parts of the arrays, and every collective is written in the program (inner/division.py). Only the optimizer's update is
left to the compiler's partitioner.

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

from ttt_e2e.cluster.mesh import BATCH, divide, partition_specs
from ttt_e2e.config import Config
from ttt_e2e.data.masking import is_target
from ttt_e2e.errors import UserError
from ttt_e2e.inner import Reading, inner_learning_rate, read_batch
from ttt_e2e.inner.division import DATA, Division, complete, fetch
from ttt_e2e.kernels.precision import matmul_precision
from ttt_e2e.model import Transformer, abstract_model, abstract_transformer
from ttt_e2e.model.engram import with_alike
from ttt_e2e.model.parameters import split
from ttt_e2e.train import policies
from ttt_e2e.train.optimizers import gradient_norm, learning_rate_schedule


class TrainState(NamedTuple):
    """State of training: input and result of a training step, and contents of a checkpoint."""

    params: Any  # {"fast": W_0, "slow": theta}, nested dicts of arrays
    optimizer: Any  # optax state
    step: jax.Array  # number of updates so far


def init_state(config: Config, optimizer: optax.GradientTransformation, alike_V=None) -> TrainState:
    """Initialises parameters and optimizer state. Pure: under `jit` with shardings, each device makes its shards.

    alike_V: for each token, the one that stands for it in Engram's n-grams; None = each for itself.
    """
    _, fast, slow = split(Transformer(config.model, nnx.Rngs(config.train.seed)))
    params = {"fast": fast, "slow": slow}
    if alike_V is not None:
        params = with_alike(params, alike_V)
    return TrainState(params, optimizer.init(params), jnp.int32(0))


class Policies(NamedTuple):
    """The config with every "auto" of its inner loop resolved, and the division of arrays among devices."""

    config: Config
    division: Division

    def record(self) -> dict[str, str]:
        """Lists the resolved fields for the run directory: {field: value}."""
        prefix = "sequence" if self.division.by_sequence else "matrices"
        inner = {f"inner.{name}": getattr(self.config.inner, name) for name in ("trajectory", "remat")}
        return inner | {"mesh.prefix": prefix}


def take_policies(config: Config, mesh: Mesh) -> Policies:
    """Resolves "auto" for a training step on a mesh. Raises `UserError` where a mixer cannot serve it."""
    transformer = abstract_transformer(config.model)
    differentiated_twice = transformer.suffix_stacks if config.inner.gradient != "first_order" else {}
    if obstacle := transformer.obstacle("twice differentiable", differentiated_twice):
        raise UserError(f"{obstacle}: config.inner.gradient must be 'first_order'")
    graphdef, params = abstract_model(config.model)
    division = divide(config, params, mesh, by_sequence=policies.prefix_by_sequence(config, mesh))
    return Policies(policies.for_training(config, graphdef, params, mesh, division), division)


def make_train_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state_shardings,
    resolved: Policies | None = None,
) -> Callable:
    """Makes the compiled outer step: (state, tokens [B, T + 1]) -> (state, metrics). The state passed in is donated.

    resolved: result of `take_policies`, if it was called before.

    The metrics are scalars: `loss`, `grad_norm` (before clipping), `learning_rate` and `inner_learning_rate` of the
    step.
    """
    resolved = resolved or take_policies(config, mesh)
    loss_and_gradient = make_gradient(resolved.config, mesh, resolved.division)
    rate_at = learning_rate_schedule(config.optimizer)

    def train_step(state: TrainState, tokens):
        inner_rate = inner_learning_rate(config.inner, state.step)
        mean_loss, gradient = loss_and_gradient(state.params, tokens, inner_rate)
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
        in_shardings=(state_shardings, NamedSharding(mesh, BATCH)),
        out_shardings=(state_shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def make_gradient(config: Config, mesh: Mesh, division: Division, mean_loss: Callable | None = None) -> Callable:
    """Makes the function (params, tokens [B, T + 1], inner learning rate) -> (mean loss of the batch, its gradient).

    mean_loss: (params, tokens, inner learning rate) -> mean loss of a device's own sequences; None = `read_batch`'s.
    """
    graphdef, params = abstract_model(config.model)
    specs = partition_specs(params, mesh, config.model)
    if mean_loss is None:

        def mean_loss(params, tokens, inner_rate):
            return _read(config, graphdef, division, params, tokens, inner_rate).loss.mean()

    @matmul_precision(config.model.compute_dtype)
    def on_a_device(params, tokens, inner_rate):
        def share_of_loss(params, tokens):
            return mean_loss(params, tokens, inner_rate) / mesh.shape[DATA]

        share, gradient = _accumulate(
            lambda part: jax.value_and_grad(share_of_loss)(params, part), tokens, config.train.accumulation_steps
        )
        return jax.lax.psum(share, DATA), complete(division, gradient)

    return jax.shard_map(on_a_device, mesh=mesh, in_specs=(specs, BATCH, P()), out_specs=(P(), specs), check_vma=False)


def make_eval_step(config: Config, mesh: Mesh, params_shardings) -> Callable:
    """Makes the compiled evaluation: (params, tokens [B, T + 1], inner learning rate, n) -> (sums, token_nll [B, T]).

    The sums are over the first n sequences: of their losses, `loss`; over their unmasked targets, of the NLL,
    `token_nll`, and their number, `num_tokens`. Sums are replicated on all devices; `token_nll` [B, T] is sharded like
    the tokens.
    """
    config = policies.for_reading(config)
    graphdef, params = abstract_model(config.model)
    division = divide(config, params, mesh, by_sequence=policies.prefix_by_sequence(config, mesh))

    @matmul_precision(config.model.compute_dtype)
    def on_a_device(params, tokens, inner_rate):
        reading = _read(config, graphdef, division, params, tokens, inner_rate)
        return reading.loss, reading.token_nll_T

    specs = (partition_specs(params, mesh, config.model), BATCH, P())
    read_all = jax.shard_map(on_a_device, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)

    def eval_step(params, tokens, inner_rate, num_sequences):
        loss_B, token_nll_BT = read_all(params, tokens, inner_rate)
        counts_B = jnp.arange(len(tokens)) < num_sequences
        is_target_BT = counts_B[:, None] & is_target(tokens[:, 1:], config.data.masked_id)
        sums = {
            "loss": jnp.where(counts_B, loss_B, 0).sum(),
            "token_nll": jnp.where(is_target_BT, token_nll_BT, 0).sum(),
            "num_tokens": is_target_BT.sum(),
        }
        return sums, token_nll_BT

    batch, everywhere = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    return jax.jit(
        eval_step,
        in_shardings=(params_shardings, batch, everywhere, everywhere),
        out_shardings=(everywhere, batch),
    )


def _read(config: Config, graphdef, division: Division, params, tokens, inner_rate) -> Reading:
    """Reads a device's sequences, tokens [B, T + 1], given its shards of the parameters."""
    fast = fetch(division.fast, params["fast"])
    fast = jax.tree.map(lambda w: jnp.broadcast_to(w, (len(tokens), *w.shape)), fast)
    options = {"inner": config.inner, "learning_rate": inner_rate, "bos_id": config.data.masked_id}
    return read_batch(graphdef, fast, params["slow"], tokens, **options, division=division)


def _accumulate(function, tokens, num_parts: int):
    """Averages `function` over `num_parts` parts of a device's sequences [B, T + 1], run one after the other."""
    if num_parts == 1:
        return function(tokens)
    parts = tokens.reshape(num_parts, -1, tokens.shape[1])
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, parts[0]))
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), total, parts)
    return jax.tree.map(lambda x: x / num_parts, total)
