"""The eight models that are compared, at one small size: the same data, tokens, optimizer and evaluation.

    ttt-e2e train --config=configs/comparison.py:KIND --workdir=runs/KIND
    python launch/sweep.py --config=configs/comparison.py --output=runs/comparison --parallel=2      (docs/sweeps.md)
    ttt-e2e report --workdirs=runs/comparison --output=runs/comparison/report

KIND is one of those of configs/paper.py: e2e, e2e_hybrid, full, swa, hybrid, mamba2, gdn, kvb. They have equal numbers
of parameters to 2 %. It takes the token store of `make train`, the source code of Python's standard library.

Hardware: two CPU cores; docs/results.md has the time of a run.
"""

from ttt_e2e.config import default_config
from ttt_e2e.errors import UserError

WINDOW = 64
ONE_OF_SIX = ",".join(["window"] * 5 + ["attention"] + ["window"] * 2)
# kind -> (pattern of mixers, width of the MLPs)
KINDS = {
    "e2e": ("window", 192),
    "e2e_hybrid": (ONE_OF_SIX, 192),
    "full": ("attention", 240),
    "swa": ("window", 240),
    "hybrid": (ONE_OF_SIX, 240),
    "mamba2": ("mamba2,window", 192),
    "gdn": ("gated_deltanet,window", 208),
    "kvb": ("ttt_kvb,window", 224),
}


def get_config(arg: str = "e2e"):
    """The ConfigDict of one of the models."""
    if arg not in KINDS:
        raise UserError(f"configs/comparison.py has no {arg!r}: it takes {', '.join(KINDS)}")
    mixer, mlp_width = KINDS[arg]
    learns = arg.startswith("e2e")
    config = default_config()
    config.model.update(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=mlp_width,
        num_hidden_layers=8,
        num_attention_heads=3,
        sliding_window=WINDOW,
        num_fast_blocks=2 if learns else 0,
        mixer=mixer,
    )
    # The mixers' own sizes are made for widths of thousands: states and heads in the same proportion to this one.
    config.model.mamba2.update(head_dim=32, state_size=32, chunk_size=64)
    config.model.gated_deltanet.update(head_dim=24)
    config.model.ttt_kvb.update(num_heads=3, low_rank=8, chunk_size=64)
    config.inner.update(mini_batch_size=64 if learns else 1024, learning_rate=1.0, clip_norm=1.0)
    config.train.update(seq_len=1024, global_batch_size=4, num_steps=300)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=30)
    config.data.update(path="data/stdlib", bos_id=1)
    config.mesh.data = 1  # four sequences do not spread over many devices
    config.eval.update(every_steps=100, num_sequences=160, batch_size=8)
    return config


def sweep():
    """All models."""
    return {"arg": list(KINDS)}
