"""Fields of a request that have one entry for all networks that it names, or one for each."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldmcli.errors import UsageError, printable

MAX_ENTRIES = 16
MAX_STRENGTH = 10.0
_MAX_NAME = 4096

Reader = Callable[[str, Any], Any]  # of one entry of the field of this name; raises UsageError


def entries(name: str, value: Any, read: Reader, *, alone: bool = False) -> tuple[Any, ...]:
    """A field's entries: a list, one value alone, as `alone` says of what looks like a list, or several in one text
    with semicolons between. Raises UsageError."""
    if isinstance(value, str):
        value = [one.strip() for one in value.split(";") if one.strip()] or [""]
    elif alone or not isinstance(value, list | tuple):
        value = [value]
    if len(value) > MAX_ENTRIES:
        raise UsageError(f"{name} has {len(value)} entries; at most {MAX_ENTRIES} are accepted.")
    return tuple(read(name, one) for one in value)


def for_each(fields: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """What the fields `names` say of each network that the first of them names. The second are pictures: where there
    are none, the one that is drawn on. Raises UsageError where there are fewer or more entries than networks."""
    networks, pictures = names[:2]
    nets, given = fields[networks], [name for name in names[1:] if fields[name]]
    if not nets:
        if given:
            raise UsageError(f"{given[0]} is for a request with {_with_article(networks)}; give one, or leave it out.")
        return []
    columns = {}
    for name in given:
        values = list(fields[name])
        if len(values) not in (1, len(nets)):
            raise UsageError(
                f"{name} has {len(values)} entries and {networks} {len(nets)}; give one for all, or one for each."
            )
        columns[name] = values * (len(nets) // len(values))
    if pictures not in columns:
        if fields["image"] is None:
            raise UsageError(f"{networks} has no {pictures}; give the picture that it is to follow.")
        columns[pictures] = [fields["image"]] * len(nets)
    return [{networks: net} | {name: columns[name][i] for name in columns} for i, net in enumerate(nets)]


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def text(name: str, value: Any) -> str:
    """The name of a file, or of what the hub has."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str) or not value or "\0" in value or len(value) > _MAX_NAME:
        raise UsageError(f"{name} {printable(repr(value))} is no name of a file.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} is not valid Unicode text (it holds a lone surrogate).") from None
    return value


def picture(name: str, value: Any) -> str | bytes:
    """A path, or a file's bytes."""
    if isinstance(value, bytes) and value:
        return value
    return text(name, value)


def number(most: float) -> Reader:
    """Numbers from 0 to `most`."""

    def read(name: str, value: Any) -> float:
        found = value
        if isinstance(value, str):
            try:
                found = float(value)
            except ValueError:
                found = None
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= most:
            raise UsageError(f"{name} {printable(repr(value))} is not a number from 0 to {most:g}.")
        return float(found)

    return read


def choice(choices: Sequence[str]) -> Reader:
    """One of some words."""

    def read(name: str, value: Any) -> str:
        if value not in choices:
            raise UsageError(f"{name} {printable(repr(value))} is not known; choose from {', '.join(choices)}.")
        return str(value)

    return read
