"""Checks which fields of the config changed at a resume, by the rule of each field (ttt_e2e/config/sections.py)."""

import logging

from ttt_e2e.config import Config, each_field
from ttt_e2e.config.fields import LOGGED, REFUSED
from ttt_e2e.errors import UserError

logger = logging.getLogger(__name__)


def check_resume(workdir, ours: Config, theirs: Config, has_steps: bool) -> None:
    """Compares the config to resume a run with, `ours`, to that of its last start, `theirs`; logs what may change.

    has_steps: whether the run has saved a step. If not, it begins anew, and only changes of the model are refused.

    Raises:
      UserError: a field differs that may not.
    """
    changes = [
        (f"{section}.{f.name}", f.metadata["resume"], our, their)
        for (section, f, our), (_, _, their) in zip(each_field(ours), each_field(theirs), strict=True)
        if our != their
    ]
    for name, rule, our, their in changes:
        if rule == REFUSED and (has_steps or name.startswith("model.")):
            raise UserError(
                f"workdir {workdir} holds a run whose {name} is {their!r}, but the config says {our!r}: "
                f"set --config.{name}={their}, or choose another workdir"
            )
    for name, rule, our, their in changes:
        if rule == LOGGED and has_steps:
            logger.warning("config.%s is %r from here on; until now it was %r", name, our, their)
