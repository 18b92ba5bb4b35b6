"""The record of progress in a checkpoint: the step, the position in the data, the model, and digests of all arrays."""

import hashlib
import json

from etils import epath

from ttt_e2e.config import Config, to_dict
from ttt_e2e.errors import UserError, first_line
from ttt_e2e.strict_json import to_json

POSITION_UNITS = ("seq_len", "global_batch_size")


class DamagedError(UserError):
    """A checkpoint differs from what was saved, or cannot be read."""


def progress_of(step: int, next_batch: int, config: Config, **more) -> dict:
    """The record of progress that a checkpoint holds beside its arrays.

    It has `step` (updates made), `next_batch` (position in the data) with the fields that define a batch, and `model`.
    `more` holds what else the training loop records: `data`, the token store's fingerprint; `owes_evaluation`, if the
    evaluation due at this step was not finished; `productive_seconds` of the steps up to this one.
    """
    units = {field: getattr(config.train, field) for field in POSITION_UNITS}
    return {"step": step, "next_batch": next_batch, **units, **more, "model": to_dict(config)["model"]}


def check_position(progress: dict, config: Config, fingerprint: str) -> None:
    """Raises `UserError` if `next_batch` would be another place in the data under this config and token store.

    fingerprint: of the token store that the config names.
    """
    if progress.get("data", fingerprint) != fingerprint:
        raise UserError(
            f"config.data.path is {config.data.path!r}, a token store with fingerprint {fingerprint}, but the run to "
            f"resume has read one with {progress['data']}: start a new run from it with config.train.init_from"
        )
    for field in POSITION_UNITS:
        ours, theirs = getattr(config.train, field), progress[field]
        if ours != theirs:
            raise UserError(
                f"config.train.{field} is {ours}, but the run to resume has {theirs}, by which its position in the "
                "data is counted: start a new run from it with config.train.init_from"
            )


def seal(progress: dict) -> dict:
    """A copy of a record with `digest`, a checksum of all other entries."""
    others = {name: value for name, value in progress.items() if name != "digest"}
    return others | {"digest": hashlib.sha256(to_json(others, sort_keys=True).encode()).hexdigest()[:16]}


def load_progress(step_directory) -> dict:
    """Reads a checkpoint's record of progress, digests included. Raises `DamagedError` if it is missing or damaged.

    It does without Orbax, which is slow to import: `launch/sweep.py` reads the records of hundreds of runs.
    """
    try:
        progress = json.loads((epath.Path(step_directory) / "progress" / "metadata").read_text())
        is_whole = progress == seal(progress) or "digest" not in progress  # old checkpoints have none
    except Exception as error:  # a damaged file can raise anything
        raise DamagedError(f"checkpoint {step_directory} is incomplete: {first_line(error)}") from error
    if not is_whole or not isinstance(progress.get("step"), int):
        raise DamagedError(f"checkpoint {step_directory} is damaged: progress is not what was saved")
    return progress
