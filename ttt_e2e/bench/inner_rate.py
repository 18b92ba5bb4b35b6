"""`ttt-e2e bench inner_rate`: held-out loss of a checkpoint against the learning rate of its inner steps."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from etils import epath

from ttt_e2e.bench import table
from ttt_e2e.checkpoints.params import load_params
from ttt_e2e.checkpoints.progress import load_progress
from ttt_e2e.checkpoints.steps import find_step
from ttt_e2e.cluster.mesh import make_mesh, shardings, with_shardings
from ttt_e2e.config import Config, ModelConfig, from_config_dict, to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.figures import COLORS, STYLE, make_figure, require_matplotlib
from ttt_e2e.model import abstract_model, abstract_transformer
from ttt_e2e.model.parameters import parameter_name
from ttt_e2e.progress import progress_bar
from ttt_e2e.runs.files import replacing
from ttt_e2e.train.batches import HeldOut, check_batch, held_out_loss, open_store
from ttt_e2e.train.steps import make_eval_step

FIGURE = "inner_rate.png"
RATES = (0.0, *(10.0**exponent for exponent in range(-6, 1)))


def run(output, config: Config, checkpoint, *, rates=RATES, num_fast_blocks: int = 0) -> list[dict]:
    """Evaluates a checkpoint at several inner learning rates, by one program; writes to `output`, returns the rows.

    A model without fast MLPs learns by its own: those of its last blocks become fast, and nothing else of it changes.

    Args:
      output: directory for the results, and for their figure, inner_rate.png.
      config: of the run. `eval.num_sequences` sequences of `train.seq_len` tokens are read, in mini-batches of
        `inner.mini_batch_size`, with inner gradients clipped at `inner.clip_norm`.
      checkpoint: a run directory, or a checkpoint in one.
      rates: inner learning rates; 0 and, for a model with fast MLPs, its own `inner.learning_rate` are always added.
      num_fast_blocks: of a model without fast MLPs, the last blocks whose MLPs learn; 0 = a quarter of all.

    Returns:
      A row for each rate, in ascending order: `loss` as in training, `token_loss` over all unmasked targets, and
      `difference` of the loss from that at rate 0. They are None where the loss is not finite: the model diverged.
    """
    if illegal := [rate for rate in rates if not 0 <= rate < math.inf]:
        raise UserError(f"--rates has {illegal[0]}, but it takes finite numbers of at least 0")
    require_matplotlib()
    learning = _learning_config(config, num_fast_blocks)
    mesh = make_mesh(config.mesh)
    check_batch("config.eval.batch_size", config.eval.batch_size, mesh)
    store = open_store(config, config.data.eval_split, checkpoint)
    step_directory = find_step(checkpoint)
    params, placed = _load(step_directory, config.model, learning.model, mesh)
    eval_step = make_eval_step(learning, mesh, placed)
    own_rate = config.inner.learning_rate if config.model.num_fast_blocks else 0.0
    about = {
        "variant": "fast MLPs" if config.model.num_fast_blocks else "MLPs made fast",
        "step": load_progress(step_directory)["step"],
        "num_fast_blocks": learning.model.num_fast_blocks,
        "mini_batch": config.inner.mini_batch_size,
        "seq_len": config.train.seq_len,
        "clip_norm": config.inner.clip_norm,
    }
    rows = []
    for rate in progress_bar(sorted({0.0, own_rate, *rates}), desc="bench inner_rate", unit="rate"):

        def evaluate(tokens, num_sequences, rate=rate):
            return eval_step(params, tokens, rate, num_sequences)

        found = held_out_loss(evaluate, store, learning, mesh)
        row = about | {"num_sequences": found.num_sequences, "num_tokens": found.num_tokens, "inner_rate": rate}
        rows.append(row | _losses(found, rows))
    shown = [row | ({"loss": "diverged"} if row["loss"] is None else {}) for row in rows]
    print(table.write(output, rows, "Inner learning rate", _notes(rows, own_rate), shown))
    with replacing(epath.Path(output) / FIGURE) as file:
        _draw(rows, own_rate).savefig(file, format="png", dpi=150)
    return rows


def _learning_config(config: Config, num_fast_blocks: int) -> Config:
    """The config of the model that learns. Raises `UserError` where it would learn nothing, or has no such blocks."""
    model, b = config.model, config.inner.mini_batch_size
    if b == config.train.seq_len:
        raise UserError(
            f"config.inner.mini_batch_size is {b}, the whole sequence, and nothing is read after its inner step: it "
            f"must be a divisor of config.train.seq_len {b} below it"
        )
    if num_fast_blocks < 0 or num_fast_blocks > model.num_hidden_layers:
        legal = f"at least 1 and at most the model's {model.num_hidden_layers} blocks, or 0 for a quarter of them"
        raise UserError(f"--num_fast_blocks is {num_fast_blocks}, but it must be {legal}")
    if model.num_fast_blocks:
        if num_fast_blocks:
            raise UserError(
                f"--num_fast_blocks is {num_fast_blocks}, but the model has {model.num_fast_blocks} blocks with a fast "
                "MLP, which learn: leave it out"
            )
        return config
    fields = to_dict(config)
    fields["model"] |= {
        "num_fast_blocks": num_fast_blocks or max(1, model.num_hidden_layers // 4),
        "fast_intermediate_size": model.intermediate_size,
        "fast_layer_scale": 0.0,
    }
    return from_config_dict(fields)


def _load(step_directory, model: ModelConfig, learning: ModelConfig, mesh):
    """Loads the parameters of the model that learns; returns them and their shardings."""
    _, abstract = abstract_model(model)
    placed = shardings(abstract, mesh, model)
    params = load_params(step_directory, with_shardings(abstract, placed))
    if learning == model:
        return params, placed
    placed = shardings(abstract_model(learning)[1], mesh, learning)
    return jax.jit(partial(with_fast_mlps, model, learning), out_shardings=placed)(params), placed


def with_fast_mlps(model: ModelConfig, learning: ModelConfig, params):
    """Makes the parameters of a model whose last blocks' MLPs are fast, from those of one without fast MLPs.

    It computes the same before it learns: in these blocks, the slow MLPs, which come after the fast ones, are 0.
    """
    given = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    place = {i: (stack, n) for stack, of in abstract_transformer(model).block_indices.items() for n, i in enumerate(of)}
    blocks = abstract_transformer(learning).block_indices

    def make(path, leaf):
        _, top, *rest = parameter_name(path).split(".", 2)
        if top not in blocks:
            return given[parameter_name(path)]
        [name] = rest
        if top.startswith("suffix") and name.startswith("mlp."):
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = name.replace("fast_mlp", "mlp")
        return jnp.stack([given[f"slow.{stack}.{name}"][n] for stack, n in map(place.get, blocks[top])])

    return jax.tree_util.tree_map_with_path(make, abstract_model(learning)[1])


def _losses(found: HeldOut, rows: list[dict]) -> dict:
    """The losses of a row, None where they are not finite; `rows` are those before it, the first of rate 0."""
    if not math.isfinite(found.loss):
        return {"loss": None, "token_loss": None, "difference": None}
    without = rows[0]["loss"] if rows else found.loss
    difference = None if without is None else found.loss - without
    return {"loss": found.loss, "token_loss": found.token_loss, "difference": difference}


def _notes(rows: list[dict], own_rate: float) -> str:
    """Markdown: the best rate, the model's own, and the rates at which it diverges."""
    lines = []
    if finite := [row for row in rows if row["loss"] is not None]:
        best = min(finite, key=lambda row: row["loss"])
        lines.append(f"- The best of these rates is {best['inner_rate']:g}, with loss {best['loss']:.4f}.")
    lines += [f"- The model's own rate is {own_rate:g}."] if own_rate else []
    if diverged := [f"{row['inner_rate']:g}" for row in rows if row["loss"] is None]:
        lines.append(f"- The loss is not finite at {', '.join(diverged)}.")
    return "\n".join(lines)


def _draw(rows: list[dict], own_rate: float):
    """Draws the loss against the rate; rates whose loss is far above that without learning are marked at the top."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = make_figure(figsize=(7, 4.2))
        panel = figure.subplots()
        without, *points = [(row["inner_rate"], math.inf if row["loss"] is None else row["loss"]) for row in rows]
        finite = [loss for _, loss in (without, *points) if loss < math.inf]
        low, level = min(finite, default=0.0), min(without[1], max(finite, default=1.0))
        top = min(max(finite, default=1.0), level + 2 * (level - low) + 0.02 * level)
        margin = 0.08 * (top - low) or 0.1
        inside = [(rate, loss) for rate, loss in points if loss <= top]
        above = [rate for rate, loss in points if loss > top]
        panel.plot(
            [rate for rate, _ in inside],
            [loss for _, loss in inside],
            marker="o",
            markersize=4,
            linewidth=1.6,
            color=COLORS[0],
            label="learning",
        )
        if without[1] < math.inf:
            panel.axhline(without[1], linestyle="--", color=COLORS[7], label="not learning (rate 0)")
        if own_rate:
            panel.axvline(own_rate, linestyle=":", color=COLORS[1], label=f"the model's own rate, {own_rate:g}")
        if above:
            marks = {"linestyle": "", "marker": "^", "clip_on": False, "color": COLORS[1]}
            panel.plot(above, [top + margin] * len(above), label="far above, or diverged", **marks)
        panel.set(xscale="log", ylim=(low - margin, top + margin), title="Held-out loss by inner learning rate")
        panel.set(xlabel="inner learning rate", ylabel="loss (nats per token)")
        panel.legend()
        return figure
