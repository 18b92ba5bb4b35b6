"""Checks, before the first step, that a model made from another one still computes what that one does.

It is meant for a pretrained model that fast MLPs or a window were added to. The usual ways to lose what it knows (a MLP
of another width, another convention of RoPE, inner steps that it was not trained for) show in the loss at once.
"""

import logging
import math
from dataclasses import fields, replace
from typing import NamedTuple

from ttt_e2e.checkpoints.params import load_params
from ttt_e2e.cluster.mesh import shardings, with_shardings
from ttt_e2e.config import Config, ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model import abstract_model
from ttt_e2e.runs.directory import find_run, load_config
from ttt_e2e.train.batches import held_out_loss, open_store
from ttt_e2e.train.steps import make_eval_step

MOST = 0.05  # nats by which the losses may differ
WINDOW = ("sliding_window", "attention_sinks", "mixer")  # fields of config.model that are taken over for longer texts
# Those in which a model may differ from its base: what is added to it, and how it is computed.
MAY_DIFFER = (
    *WINDOW,
    *("num_fast_blocks", "fast_intermediate_size", "fast_layer_scale", "compute_dtype", "param_dtype"),
    *("attention_backend", "initializer_range", "engram", "mixer_sections"),
)

logger = logging.getLogger(__name__)


class Comparison(NamedTuple):
    """Held-out losses of sequences of one length, in nats for each token."""

    seq_len: int
    base: float
    ours: float
    without_learning: float
    base_name: str


def check_start(config: Config, params, mesh) -> None:
    """Compares held-out losses of the initial parameters with those of the run `config.train.base`, and logs them.

    Sequences no longer than the window are compared with the base as it is. Longer ones, of `train.seq_len`, are
    compared with the base under the same window. Reads `eval.num_sequences` of each at the full inner learning rate.

    Raises:
      UserError: a loss is more than `MOST` from the base's; the message says what to look at. Or there is no such run.
    """
    base = load_config(find_run(config.train.base))
    b, T = config.inner.mini_batch_size, config.train.seq_len
    short = min((*config.model.windows, T))
    compared = {short // b * b or short: base.model}
    if T not in compared:
        if len(base.model.mixers) == len(config.model.mixers):
            window = {name: getattr(config.model, name) for name in WINDOW}
            compared[T] = replace(base.model, **window)
        else:
            logger.info("beyond the window there is no comparison, as the base has another pattern of mixers")
    for seq_len, model in compared.items():
        ours = _at(config, seq_len, min(b, seq_len))
        theirs = replace(_at(config, seq_len, seq_len), model=replace(model, compute_dtype=config.model.compute_dtype))
        placed = shardings(abstract_model(theirs.model)[1], mesh, theirs.model)
        base_params = load_params(config.train.base, with_shardings(abstract_model(theirs.model)[1], placed))
        [base_loss] = _losses(theirs, base_params, mesh, [0.0])
        rates = [config.inner.learning_rate, 0.0] if config.model.num_fast_blocks else [0.0]
        our_losses = _losses(ours, params, mesh, rates)
        name = "the base" if model is base.model else "the base with the same window"
        found = Comparison(seq_len, base_loss, our_losses[0], our_losses[-1], name)
        logger.info("before the first step, %s", _line(found))
        if not abs(found.ours - found.base) <= MOST:
            raise UserError(f"before the first step, {_line(found)}: {_cause(found, config.model, base.model)}")


def _at(config: Config, seq_len: int, mini_batch_size: int) -> Config:
    """The config that evaluates sequences of another length."""
    inner = replace(config.inner, mini_batch_size=mini_batch_size, segment_length=0)
    return replace(config, train=replace(config.train, seq_len=seq_len), inner=inner)


def _losses(config: Config, params, mesh, inner_rates: list[float]) -> list[float]:
    """Held-out losses, means over unmasked targets, at each inner learning rate."""
    store = open_store(config, config.data.eval_split)
    eval_step = make_eval_step(config, mesh, shardings(abstract_model(config.model)[1], mesh, config.model))

    def loss(inner_rate: float) -> float:
        def read(tokens, num_sequences):
            return eval_step(params, tokens, inner_rate, num_sequences)

        return held_out_loss(read, store, config, mesh, f"compare with {config.train.base}").token_loss

    return [loss(inner_rate) for inner_rate in inner_rates]


def _line(found: Comparison) -> str:
    return (
        f"the loss of held-out sequences of {found.seq_len} tokens is {found.ours:.4f}, that of {found.base_name} "
        f"{found.base:.4f}"
    )


def _cause(found: Comparison, ours: ModelConfig, theirs: ModelConfig) -> str:
    """Says what to look at, by what the losses and the two configs show."""
    if abs(found.without_learning - found.base) <= MOST:
        return (
            f"without inner steps it is {found.without_learning:.4f}, so these do the harm: the fast MLPs do not begin "
            "without effect (ttt-e2e import --num_fast_blocks), or config.inner.learning_rate is too large"
        )
    for field in fields(ModelConfig):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name not in MAY_DIFFER and mine != other:
            return f"config.model.{field.name} is {mine!r}, but that of the base is {other!r}"
    if found.ours > math.log(ours.vocab_size) - 1:
        return (
            f"ln(vocab_size) is {math.log(ours.vocab_size):.2f}, what a new model has: config.train.init_from does not "
            "have the parameters of this base"
        )
    return "config.train.init_from has other parameters than this base"
