"""How a command ends early: the user can mend it, or it is to be started again."""

import os

EXIT_REQUEUE = os.EX_TEMPFAIL  # 75: the exit code that asks a launcher to start the command again


class UserError(Exception):
    """Bad input. The message is one line that names the field or file, the value found and what would be legal.

    The command line prints the message and exits with a non-zero code; any other exception is a defect of ours and
    keeps its stack trace. Characters that would break the line, from a user's value or a library's text, are escaped.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class PreemptedError(Exception):
    """The machine is wanted for something else; nothing is lost. The message is one line that says what is kept.

    The command line prints the message and exits with `EXIT_REQUEUE`. All processes of a run raise it at one step.
    """


def first_line(error: Exception) -> str:
    """The first line of what an exception says, cut to 300 characters; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
