"""Checks which fields of the config changed at a resume, by the rule of each field (ttt_e2e/config/sections.py)."""

import logging

from ttt_e2e.config import Config, each_field
from ttt_e2e.config.fields import LOGGED, REFUSED
from ttt_e2e.errors import UserError

logger = logging.getLogger(__name__)


def check_resume(workdir, ours: Config, theirs: Config, has_steps: bool) -> None:
    """Compares the config to resume a run with, `ours`, to that of its last start, `theirs`.

    has_steps: whether the run has saved a step. If not, it begins anew, and only changes of the model are refused.

    Raises:
      UserError: a field differs that may not.
    """
    for name, rule, our, their in _changes(ours, theirs):
        if rule == REFUSED and (has_steps or name.startswith("model.")):
            raise UserError(
                f"workdir {workdir} holds a run whose {name} is {their!r}, but the config says {our!r}: "
                f"set --config.{name}={their}, or choose another workdir"
            )


def log_changes(ours: Config, theirs: Config) -> None:
    """Logs the fields that differ between the configs of this start and the last one, and that change the results."""
    for name, rule, our, their in _changes(ours, theirs):
        if rule == LOGGED:
            logger.warning("config.%s is %r from here on; until now it was %r", name, our, their)


def _changes(ours: Config, theirs: Config) -> list[tuple]:
    """(name, rule, our value, their value) of each field that differs."""
    return [
        (f"{section}.{f.name}", f.metadata["resume"], our, their)
        for (section, f, our), (_, _, their) in zip(each_field(ours), each_field(theirs), strict=True)
        if our != their
    ]
