"""Defines and reads the flags of `ttt-e2e evaluate`, which select evaluations and set their settings.

From Python the same names are keyword arguments.
"""

from collections.abc import Iterable
from typing import Any

from absl import flags

from ttt_e2e import settings
from ttt_e2e.config import suggestion
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.base import Evaluation, evaluations


def define(values: flags.FlagValues) -> None:
    """Defines the flags of all evaluations: those of their settings, and a boolean --NAME where none is --NAME."""
    for evaluation in evaluations().values():
        settings.define(values, evaluation.Settings)
        if evaluation.name not in values and not evaluation.is_default:
            flags.DEFINE_boolean(evaluation.name, False, evaluation.help, flag_values=values)


def from_keywords(keywords: dict[str, Any]) -> flags.FlagValues:
    """The flags of all evaluations, of which these have been given: {"context_lengths": [512, 1024], ...}.

    Raises:
      UserError: there is no such flag, or its value is of another type.
    """
    values = flags.FlagValues()
    define(values)
    values.mark_as_parsed()
    for name, value in keywords.items():
        if name not in values:
            raise UserError(f"evaluate has no setting {name!r}: {suggestion(name, sorted(values))}")
        several = isinstance(value, Iterable) and not isinstance(value, str)
        try:
            values[name].parse(",".join(map(str, value)) if several else str(value))
        except flags.Error as error:
            raise UserError(" ".join(str(error).split())) from None
    return values


def asked(values: flags.FlagValues) -> list[tuple[Evaluation, Any]]:
    """The evaluations that flags select, each with its settings; the default evaluation where they select none.

    Raises:
      UserError: a flag belongs to an evaluation that is not selected, or has an illegal value.
    """
    selected = []
    for evaluation in evaluations().values():
        if not evaluation.is_default and values[evaluation.name].value:
            selected.append((evaluation, settings.read(values, evaluation.Settings)))
            continue
        for flag in settings.flag_names(evaluation.Settings):
            if values[flag].present and flag != evaluation.name:
                raise UserError(f"--{flag} belongs to --{evaluation.name}, which is missing")
    return selected or [(each, each.Settings()) for each in evaluations().values() if each.is_default]
