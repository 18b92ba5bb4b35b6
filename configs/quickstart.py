"""The quickstart: a model that learns while it reads, on the source code of Python's standard library.

    make train

Hardware: two CPU cores, a few minutes.
"""

from ttt_e2e.config import default_config


def get_config(arg: str = ""):
    """The quickstart's ConfigDict."""
    if arg:
        raise ValueError(f"it takes no argument, not {arg!r}")
    config = default_config()
    config.model.update(
        vocab_size=257,  # bytes and BOS
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        sliding_window=128,
        num_fast_blocks=1,
    )
    config.inner.mini_batch_size = 128
    config.train.update(seq_len=2048, global_batch_size=4, num_steps=40)
    config.data.update(path="data/stdlib", bos_id=256)
    config.eval.update(num_sequences=16, every_steps=20)
    return config
