"""The errors a user can meet, each class with the exit code that `ldm` gives it.

Library code raises them; only `ldmcli.cli` turns them into text and a status. Codes follow sysexits.h where it has one.
"""

import unicodedata

_MAX_QUOTED = 200


class LdmError(Exception):
    """Base of all expected failures: one sentence that says what, where, and what to do."""

    exit_code = 1


class NotFiniteError(LdmError):
    """A network gave numbers that are not finite: too few bits for it, or damaged weights."""


class UsageError(LdmError):
    """The request itself cannot be meant: an option out of range, or options that exclude each other."""

    exit_code = 2


class BadDataError(LdmError):
    """A file is there but is not what it should be (weights, configuration, picture, prompt text)."""

    exit_code = 65


class MissingInputError(LdmError):
    """A file or folder that was named is not there."""

    exit_code = 66


class CannotCreateError(LdmError):
    """The output cannot be created: folder not writable, file there already."""

    exit_code = 73


class StorageError(LdmError):
    """Reading or writing failed under way: disk full, device error."""

    exit_code = 74


class TryAgainError(LdmError):
    """Something else is in the way for now, such as another run in the same folder; the same command works later."""

    exit_code = 75


def printable(text: str, limit: int = _MAX_QUOTED) -> str:
    """`text` made safe for a terminal: control, bidi and surrogate characters escaped, cut to `limit` characters.

    Whatever comes from a file, an argument or a server passes through here before it is printed.
    """
    shown = text[:limit]
    escaped = "".join(
        char if unicodedata.category(char)[0] != "C" else char.encode("unicode_escape").decode("ascii")
        for char in shown
    )
    return escaped if len(text) <= limit else f"{escaped}… ({len(text)} characters)"
