"""Keeps credentials, which belong in the environment, out of the files and logs that a run writes."""

import os
import re

# scheme://user:password@host, and URL queries with a signature or token. `user@host` alone is no secret.
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^\s/@:'\"]*:[^\s/@'\"]+(?=@)")
_SECRET_IN_QUERY = re.compile(
    r"(?i)([?&][\w-]*(?:token|secret|password|signature|credential|api_?key)[\w-]*=)[^&\s'\"]+"
)
_SECRET_VARIABLE = re.compile(r"(?i)(?:^|_)(?:token|secret|password|passwd|credentials?|key|apikey|pat)(?:_id)?$")
_SHORTEST = 8  # characters; shorter values of such variables ("1", "true", a name) would match in any text

REDACTED = "<redacted>"


def redact(text: str) -> str:
    """`text` without the passwords in URLs, and without the values of environment variables named like secrets."""
    text = _SECRET_IN_QUERY.sub(rf"\g<1>{REDACTED}", _PASSWORD_IN_URL.sub(REDACTED, text))
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST}
    for value in sorted(values, key=len, reverse=True):  # one may contain another
        text = text.replace(value, REDACTED)
    return text


def find_secrets(values: dict, prefix: str = "config") -> str | None:
    """Dotted name of the first string in a nested dict that contains something `redact` removes, or None."""
    for name, value in values.items():
        if isinstance(value, dict):
            if field := find_secrets(value, f"{prefix}.{name}"):
                return field
        elif isinstance(value, str) and redact(value) != value:
            return f"{prefix}.{name}"
    return None
