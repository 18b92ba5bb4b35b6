"""Writes and reads the metrics of a run.

`metrics.jsonl` is always written; TensorBoard and Weights & Biases are optional copies, never needed to resume.
"""

import contextlib
import math
import re
import uuid

from etils import epath

from ttt_e2e.config import Config, to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.paths import in_bucket
from ttt_e2e.runs.files import LinesFile, parse_json, read_text, replace_text
from ttt_e2e.strict_json import to_json


class MetricsWriter:
    """Appends one JSON object a line to `metrics.jsonl`. On resume, lines past the restored step are dropped.

    TensorBoard drops its own, too. Weights & Biases goes on with the same run, and keeps the first line of each step.
    """

    def __init__(self, workdir, config: Config, resume_step: int):
        self.path = epath.Path(workdir) / "metrics.jsonl"
        lines = read_metrics(self.path) if self.path.exists() else []
        kept = [to_json(line) + "\n" for line in lines if line["step"] <= resume_step]
        self._file = LinesFile(self.path, kept)
        self._tensorboard = _tensorboard(workdir, resume_step) if config.log.tensorboard else None
        self._wandb = _wandb(workdir, config) if config.log.wandb else None

    def write(self, step: int, values: dict) -> None:
        """Writes the metrics of a step. Values that are not finite, which JSON lacks, become null."""
        values = {k: v if v is None or math.isfinite(v) else None for k, v in values.items()}
        self._file.add([to_json({"step": step, **values}) + "\n"])
        if self._tensorboard:
            for name, value in values.items():
                if value is not None:
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def flush(self) -> None:
        """Returns when all lines are in the file."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file, and the TensorBoard and W&B writers."""
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def read_metrics(path) -> list[dict]:
    """Reads the lines of a `metrics.jsonl`, each a dict with its `step`.

    A broken last line without a line end is left out: a kill may cut it short.

    Raises:
      UserError: any other line is not an object with a step, or the file cannot be read.
    """
    *whole, rest = read_text(path).split("\n")
    objects = [_metrics_line(path, number, line) for number, line in enumerate(whole, start=1) if line.strip()]
    with contextlib.suppress(UserError):
        objects += [_metrics_line(path, len(whole) + 1, rest)] if rest else []
    return objects


def _metrics_line(path, number: int, line: str) -> dict:
    """Parses one line. Raises `UserError` unless it is an object with an integer `step`."""
    values = parse_json(line, f"{path}, line {number}")
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise UserError(f"{path}, line {number} is {line[:80]!r}, but it takes a JSON object with an integer 'step'")
    return values


def first_not_finite(metrics: dict) -> str | None:
    """Name of the first metric that is NaN or infinite, or None."""
    return next((name for name, value in metrics.items() if not math.isfinite(value)), None)


def _tensorboard(workdir, resume_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("config.log.tensorboard needs the extra: pip install 'ttt-e2e[tensorboard]'") from None
    return SummaryWriter(str(epath.Path(workdir) / "logs"), purge_step=resume_step + 1)


def _wandb(workdir, config: Config):
    try:
        import wandb
    except ImportError:
        raise UserError("config.log.wandb needs the extra: pip install 'ttt-e2e[wandb]'") from None
    place = {} if in_bucket(workdir) else {"dir": str(workdir)}
    return wandb.init(
        project=config.log.wandb,
        name=epath.Path(workdir).name,
        id=_wandb_id(workdir),
        resume="allow",
        config=to_dict(config),
        allow_val_change=True,  # of the config, at a resume
        **place,
    )


def _wandb_id(workdir) -> str:
    """The id of the run at Weights & Biases, stored in `logs/wandb_id`: every start of the run is of the same one."""
    path = epath.Path(workdir) / "logs" / "wandb_id"
    stored = path.read_bytes().decode(errors="replace").strip() if path.exists() else ""
    if not re.fullmatch(r"[a-z0-9]{8,64}", stored):  # none yet, or damaged
        stored = uuid.uuid4().hex
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, f"{stored}\n")
    return stored
