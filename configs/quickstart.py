"""The quickstart: learns while it reads, on the source code of Python's standard library; and what it compares with.

    ttt-e2e train --config=configs/quickstart.py:ARG --workdir=DIR      (`make train` runs ARG = e2e)

ARG is "e2e" (the default), "window" or "full": a model with fast weights, one without, and one with full attention, of
equal parameters (the plain ones have wider MLPs instead of a fast one), trained on the same tokens in the same order.
The window is a sixteenth of the sequence: what a model knows of the rest it must have learned while reading.

    python launch/sweep.py --config=configs/quickstart.py --output=runs/sweep --parallel=2      (docs/sweeps.md)

Hardware: two CPU cores, minutes. Expected: docs/results.md.
"""

from ttt_e2e.config import default_config
from ttt_e2e.errors import UserError


def get_config(arg: str = "e2e"):
    """The ConfigDict of one of the three models."""
    if arg not in ("e2e", "window", "full"):
        raise UserError(f"configs/quickstart.py takes e2e, window or full, not {arg!r}")
    config = default_config()
    config.model.update(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=192 if arg == "e2e" else 240,
        num_hidden_layers=4,
        num_attention_heads=3,
        sliding_window=0 if arg == "full" else 64,
        num_fast_blocks=1 if arg == "e2e" else 0,
    )
    config.inner.update(mini_batch_size=64, learning_rate=1.0, clip_norm=1.0)
    config.train.update(seq_len=1024, global_batch_size=4, num_steps=300)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=30)
    config.data.update(path="data/stdlib", bos_id=1)
    config.mesh.data = 1  # four sequences do not spread over many devices
    config.eval.update(every_steps=100, num_sequences=160, batch_size=8)
    return config


def sweep():
    """The three models, each with two seeds of its initial parameters: six points."""
    return {"arg": ["e2e", "window", "full"], "train.seed": [0, 1]}
