"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Bad input. The message is one line that names the field or file, the value found and what would be legal.

    The command line prints the message and exits with a non-zero code; any other exception is a defect of ours and
    keeps its stack trace.
    """
