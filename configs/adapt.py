"""Teaches a pretrained model to learn while it reads: a model of Hugging Face, imported with and without fast MLPs.

    ttt-e2e import --source=huggingface --checkpoint=DIR --output=runs/base
    ttt-e2e import --source=huggingface --checkpoint=DIR --output=runs/start --window=512 --attention_sinks=4 \
      --num_fast_blocks=8 --fast_intermediate_size=576
    ttt-e2e train --config=configs/adapt.py:runs/start,runs/base --workdir=runs/adapted --config.data.path=data/mine

The argument is START,BASE. Which blocks are fast, the window and its sinks are those of START. Before the first step
the run compares START with BASE, and stops where START has lost something. With a START that has a window and no fast
MLPs this is plain fine-tuning, what adaptation is to be compared with.

From a short context to a longer one, in two runs: the second with `--config.train.seq_len=8192` and
`--config.train.init_from` the first. Freeze the rest of the model by `--config.optimizer.train_only=fast_mlp`.

Hardware: SmolLM2-135M on two CPU cores, about a minute a step. Expected: docs/results.md.
"""

from ttt_e2e.errors import UserError
from ttt_e2e.flags import load_config_file


def get_config(arg: str = ""):
    """The ConfigDict that adapts START, the first of the two run directories START,BASE in `arg`."""
    start, _, base = arg.partition(",")
    if not start or not base:
        raise UserError(f"configs/adapt.py takes START,BASE, two runs of `ttt-e2e import`, not {arg!r}")
    config = load_config_file(f"{start}/config.json")
    config.train.update(init_from=start, base=base, seq_len=2048, global_batch_size=8, num_steps=1000)
    # What is new learns faster than what was trained before, and inner steps begin small.
    config.optimizer.update(learning_rate=1e-4, end_learning_rate=1e-5, warmup_steps=20, decay_steps=0, fast_rate=100.0)
    config.optimizer.weight_decay = 0.0
    config.inner.update(learning_rate=1.0, clip_norm=1.0, warmup_steps=100, warmup_init=0.0)
    config.inner.mini_batch_size = 256 if config.model.num_fast_blocks else config.train.seq_len
    config.eval.update(every_steps=100, num_sequences=16, batch_size=8)
    return config
