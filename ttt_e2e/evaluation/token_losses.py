"""Held-out loss of a checkpoint, token by token, with and without learning while reading."""

import json

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_e2e.checkpoints.params import load_params
from ttt_e2e.checkpoints.progress import load_progress
from ttt_e2e.checkpoints.steps import find_step
from ttt_e2e.cluster.agreement import watch_for_preemption
from ttt_e2e.cluster.mesh import make_mesh, shardings, with_shardings
from ttt_e2e.config import Config
from ttt_e2e.model import abstract_model
from ttt_e2e.train.batches import check_batch, held_out_loss, open_store
from ttt_e2e.train.steps import make_eval_step


def evaluate(config: Config, checkpoint, output) -> dict:
    """Evaluates a checkpoint on `data.eval_split` and writes what it finds into the directory `output`.

    Writes `token_nll.npy` (float32 [sequences, seq_len], nats, unmasked, each token scored with the weights in force
    when it was read) and `metrics.json`, which is returned; for a model with fast weights also
    `token_nll_without_learning.npy`, the same at inner learning rate 0.

    Raises:
      UserError: no such checkpoint, or it or the token store does not fit the config.
      PreemptedError: a signal asked to stop; nothing is written.
    """
    with watch_for_preemption() as preemption:
        return _evaluate(config, checkpoint, output, stop=preemption.poll)


def _evaluate(config: Config, checkpoint, output, stop) -> dict:
    mesh = make_mesh(config.mesh)
    check_batch("config.eval.batch_size", config.eval.batch_size, mesh)
    store = open_store(config, config.data.eval_split)
    step_directory = find_step(checkpoint)
    _, abstract = abstract_model(config.model)
    placed = shardings(abstract, mesh, config.model)
    params = load_params(step_directory, with_shardings(abstract, placed))
    eval_step = make_eval_step(config, mesh, placed)

    whole = jax.jit(lambda nll_BT: nll_BT, out_shardings=NamedSharding(mesh, P()))
    nlls: dict[str, list[np.ndarray]] = {}  # by file, of each batch; process 0 alone keeps them

    def read(inner_rate, desc, name):
        def take(nll_BT, num_sequences):
            nll_BT = whole(nll_BT)
            if jax.process_index() == 0:
                nlls.setdefault(name, []).append(np.asarray(nll_BT)[:num_sequences])

        def evaluate(tokens, num_sequences):
            return eval_step(params, tokens, inner_rate, num_sequences)

        return held_out_loss(evaluate, store, config, mesh, desc, stop, take)

    learning = read(config.inner.learning_rate, "evaluate", "token_nll")
    metrics = {
        "step": load_progress(step_directory)["step"],
        "loss": learning.loss,
        "token_loss": learning.token_loss,
        "num_tokens": learning.num_tokens,
        "num_sequences": learning.num_sequences,
        "seq_len": config.train.seq_len,
    }
    if config.model.num_fast_blocks:
        static = read(0.0, "evaluate without learning", "token_nll_without_learning")
        metrics |= {"loss_without_learning": static.loss, "token_loss_without_learning": static.token_loss}
    if jax.process_index() == 0:
        _write(epath.Path(output), metrics, {name: np.concatenate(of) for name, of in nlls.items()})
    return metrics


def _write(output: epath.Path, metrics: dict, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays, then `metrics.json`, which says that they are whole."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.json").unlink(missing_ok=True)
    for name, array in arrays.items():
        with (output / f"{name}.npy").open("wb") as file:
            np.save(file, array.astype(np.float32))
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
