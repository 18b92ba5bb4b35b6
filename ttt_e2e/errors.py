"""The exceptions that end a command with one line: an error that the user can mend, preemption, divergence."""

import os

# What `json` raises for a text that is none, and for numbers too long and nesting too deep to read.
JSON_ERRORS = (ValueError, RecursionError)
EXIT_REQUEUE = os.EX_TEMPFAIL  # 75: exit code that asks a launcher to start the command again


class UserError(Exception):
    """Bad input. The message is one line that names the field or file, its value, and what would be legal.

    The command line prints the message and exits with code 2; any other exception is a defect of the program, and its
    stack trace is printed. Line breaks and other characters that cannot be printed are escaped in the message.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class PreemptedError(Exception):
    """A signal asked the command to stop (preemption). The message is one line that says what was saved.

    The command line prints the message and exits with `EXIT_REQUEUE`. All processes of a run raise it at the same step.
    """


class DivergedError(Exception):
    """A model computed NaN or infinity. The message is one line that says where; what was found is written.

    The command line prints the message and exits with code 1.
    """


def first_line(error: Exception) -> str:
    """First line of an exception's message, cut to 300 characters; the name of its type where there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
