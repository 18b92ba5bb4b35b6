"""`ttt-e2e bench meta_gradient`: FLOPs, memory and time of one loss and meta-gradient, however it is computed."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttt_e2e.bench import compiled, table
from ttt_e2e.config import Config, from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.inner import read_batch, reference
from ttt_e2e.inner.step import MiniBatch, mini_batch_loss
from ttt_e2e.model import Transformer
from ttt_e2e.model.parameters import merge, split

VARIANTS = (
    "plain",
    "reference",
    "nested_remat",
    *(f"exact/{t}/{r}" for t in ("store", "delta", "segment") for r in ("mini_batch", "block")),
    "first_order",
)


def run(
    output,
    *,
    width: int = 256,
    num_heads: int = 4,
    mlp_width: int = 560,
    num_blocks: int = 2,
    num_fast_blocks: int = 2,
    vocab: int = 2048,
    mini_batch: int = 128,
    window: int = 512,
    seq_len: int = 4096,
    batch: int = 1,
    dtype: str = "float32",
    variants=VARIANTS,
    repeats: int = 3,
) -> list[dict]:
    """Measures every variant on the same network and tokens; writes the results to `output`, returns the rows.

    Figures of a row: `flops` of the compiled program's matrix products, `temp_bytes`, `compile_seconds`,
    `step_seconds`, and each of them but the third as a ratio to the row of the variant "plain", where that is measured.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"--variants={variant}: legal are {', '.join(VARIANTS)}")
    model = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": num_heads,
        "sliding_window": window,
        "num_fast_blocks": num_fast_blocks,
        "compute_dtype": dtype,
    }
    num_mini_batches = seq_len // mini_batch
    inner = {"mini_batch_size": mini_batch, "segment_length": _near_root(num_mini_batches)}
    config = from_config_dict(
        {"model": model, "inner": inner, "train": {"seq_len": seq_len, "global_batch_size": batch}}
    )
    sizes = {"seq_len": seq_len, "mini_batch": mini_batch, "window": window, "batch": batch, "width": width}
    sizes |= {"num_blocks": num_blocks, "num_fast_blocks": num_fast_blocks, "vocab": vocab, "dtype": dtype}
    rows = [{"variant": variant} | sizes | _measure(variant, config, repeats) for variant in variants]
    for plain in [row for row in rows if row["variant"] == "plain"]:
        for row in rows:
            for figure in ("flops", "temp_bytes", "step_seconds"):
                row[f"{figure}_ratio"] = row[figure] / plain[figure]
    print(table.write(output, rows, "Meta-gradient"))
    return rows


def _measure(variant: str, config: Config, repeats: int) -> dict:
    graphdef, fast, slow = split(Transformer(config.model, nnx.Rngs(0)))
    shape = (config.train.global_batch_size, config.train.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    measured = compiled.measure(jax.value_and_grad(_loss(variant, config, graphdef)), (fast, slow), tokens)
    seconds = compiled.seconds_per_call(measured.call, (fast, slow), tokens, repeats=repeats)
    return {
        "flops": measured.flops,
        "temp_bytes": measured.temp_bytes,
        "compile_seconds": measured.compile_seconds,
        "step_seconds": seconds,
    }


def _loss(variant: str, config: Config, graphdef):
    """((fast, slow), tokens [B, T + 1]) -> mean loss of the batch."""
    B = config.train.global_batch_size
    if variant in ("plain", "nested_remat"):
        adapt = _without_inner_loop if variant == "plain" else _nested_remat
        return partial(_loss_of_suffix, graphdef, config, partial(adapt, config))
    gradient, *policies = variant.split("/")
    changes = dict(zip(("trajectory", "remat"), policies)) | {"gradient": gradient}
    inner = dataclasses.replace(config.inner, **changes)

    def loss(params, tokens):
        fast = jax.tree.map(lambda w: jnp.broadcast_to(w, (B, *w.shape)), params[0])
        options = {"inner": inner, "learning_rate": inner.learning_rate, "bos_id": 0}
        return read_batch(graphdef, fast, params[1], tokens, **options).loss.mean()

    return loss


def _loss_of_suffix(graphdef, config: Config, adapt, params, tokens):
    """The loss where `adapt`, (suffix_def, fast, slow, mini_batches) -> losses, is none of the package's own."""
    model = merge(graphdef, *params)
    suffix_def, fast, slow = split(model.make_suffix())

    def sequence_loss(tokens_T1):
        x_TD = model.run_prefix(model.embed(tokens_T1[:-1]))
        arrays = (x_TD, tokens_T1[1:], jnp.ones(x_TD.shape[0], bool))
        b = config.inner.mini_batch_size
        mini_batches = MiniBatch(*(a.reshape(-1, b, *a.shape[1:]) for a in arrays))
        return adapt(suffix_def, fast, slow, mini_batches).mean()

    return jax.vmap(sequence_loss)(tokens).mean()


def _without_inner_loop(config: Config, suffix_def, fast, slow, mini_batches: MiniBatch):
    """The same network read mini-batch by mini-batch, each rematerialised, its fast MLPs as static as the others."""
    suffix = merge(suffix_def, fast, slow)
    M, b, _ = mini_batches.x_bD.shape
    K = suffix.cache_size(M * b)

    @partial(jax.checkpoint, prevent_cse=False)
    def read(cache, step):
        mini_batch, i = step
        num_empty = jnp.maximum(K - i * b, 0)
        loss, (_, new) = mini_batch_loss(suffix_def, fast, slow, cache, num_empty, mini_batch)
        return cache.append(new), loss

    return jax.lax.scan(read, suffix.empty_cache(K), (mini_batches, jnp.arange(M)))[1]


def _nested_remat(config: Config, suffix_def, fast, slow, mini_batches: MiniBatch):
    """Plain autodiff with groups of mini-batches rematerialised, and within them each mini-batch again."""
    carry, steps, inner_step = reference.inner_loop(
        suffix_def, config.inner, fast, slow, mini_batches, config.inner.learning_rate
    )
    inner_step = jax.checkpoint(inner_step, prevent_cse=False)

    @partial(jax.checkpoint, prevent_cse=False)
    def read_group(carry, group):
        carry, (loss, _) = jax.lax.scan(inner_step, carry, group)
        return carry, loss

    size = config.inner.segment_length
    groups = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), steps)
    return jax.lax.scan(read_group, carry, groups)[1]


def _near_root(count: int) -> int:
    """The divisor of `count` nearest to its square root: so many mini-batches to a group."""
    return min((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - math.sqrt(count)))
