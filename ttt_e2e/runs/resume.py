"""What may change when a run is resumed: one table, by section and field of the config."""

import logging

from ttt_e2e.config import Config, to_dict
from ttt_e2e.errors import UserError

logger = logging.getLogger(__name__)

REFUSED = "refused"  # it would be another run: another model, loss, optimizer or order of the data
LOGGED = "logged"  # the run goes on under other settings: schedules, and what its evaluations are of
FREE = "free"  # nothing but rounding depends on it, or another check knows better

# A field that has no line of its own has its section's.
RULES = {
    "model": REFUSED,
    "model.attention_backend": FREE,
    "inner": REFUSED,
    "inner.warmup_steps": LOGGED,
    "inner.warmup_init": LOGGED,
    "inner.trajectory": LOGGED,  # "delta" rounds updates
    "inner.segment_length": FREE,
    "inner.remat": FREE,
    "inner.memory_budget_bytes": FREE,
    "train": REFUSED,
    "train.accumulation_steps": FREE,
    "train.num_steps": FREE,
    "train.init_from": LOGGED,
    "optimizer": REFUSED,
    "optimizer.learning_rate": LOGGED,
    "optimizer.end_learning_rate": LOGGED,
    "optimizer.warmup_steps": LOGGED,
    "optimizer.decay_steps": LOGGED,
    "data": REFUSED,
    "data.path": FREE,  # the token store's fingerprint is in the checkpoint
    "data.train_split": FREE,  # so is that of the split
    "data.eval_split": LOGGED,
    "data.tokenizer": FREE,  # compared with the token store
    "data.num_workers": FREE,
    "mesh": FREE,
    "checkpoint": FREE,
    "log": FREE,
    "eval": FREE,
    "eval.num_sequences": LOGGED,
}


def check_resume(workdir, ours: Config, theirs: Config, has_steps: bool) -> None:
    """Compares the config to resume a run with, `ours`, with that of its last start, as `RULES` say.

    Where the run has saved no step, there is nothing to go on from, and only another model is refused.

    Raises:
      UserError: a field differs that may not.
    """
    changes = list(_changes(to_dict(ours), to_dict(theirs)))
    for name, our, their in changes:
        if _rule(name) == REFUSED and (has_steps or name.startswith("model.")):
            raise UserError(
                f"workdir {workdir} holds a run whose {name} is {their!r}, but the config says {our!r}: "
                f"set --config.{name}={their}, or choose another workdir"
            )
    for name, our, their in changes:
        if _rule(name) == LOGGED and has_steps:
            logger.warning("config.%s is %r from here on; until now it was %r", name, our, their)


def _changes(ours: dict, theirs: dict):
    for section, fields in ours.items():
        for field, our in fields.items():
            if our != (their := theirs[section][field]):
                yield f"{section}.{field}", our, their


def _rule(name: str) -> str:
    return RULES.get(name) or RULES[name.partition(".")[0]]
