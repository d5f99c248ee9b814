"""Checks of single fields: each raises UsageError naming field, value and range."""

import math
import os
from typing import Any

from ldmcli.errors import UsageError, printable

MAX_PROMPT_BYTES = 1 << 20
MAX_NAME_BYTES = 4096


def checked_picture(name: str, value: Any) -> str | bytes:
    """A picture's path as text, or the bytes of its file."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bytes) and value:
        return value
    if not value:
        raise UsageError(f"{name} is empty; name a picture file.")
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a path or a picture file's bytes, not {type(value).__name__}.")
    check_text(name, value)
    return value


def checked_path(name: str, value: Any) -> str:
    """A file's path as text."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    check_text(name, value, MAX_NAME_BYTES)
    if not value:
        raise UsageError(f"{name} is empty; name a file.")
    return str(value)


def check_text(name: str, value: Any, most: int = MAX_PROMPT_BYTES) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{name} must be text, not {type(value).__name__}.")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise UsageError(f"{name} is not valid Unicode text (it holds a lone surrogate).") from None
    if size > most:
        raise UsageError(f"{name} is {size} bytes long; at most {most} are accepted.")
    if "\0" in value:
        raise UsageError(f"{name} holds a NUL character; remove it.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} {printable(repr(value))} is not known; choose from {', '.join(choices)}.")


def checked_names(name: str, value: Any, most: int) -> tuple[str, ...]:
    """A list of names; or several in one text, with semicolons between, as tables have them."""
    if isinstance(value, str):
        value = [one.strip() for one in value.split(";") if one.strip()]
    if not isinstance(value, list | tuple):
        raise UsageError(f"{name} {printable(repr(value))} is not a list of names.")
    if len(value) > most:
        raise UsageError(f"{name} has {len(value)} entries; at most {most} are accepted.")
    for one in value:
        check_text(name, one, MAX_NAME_BYTES)
        if not one.strip():
            raise UsageError(f"{name} has an empty name; leave it out.")
    return tuple(value)


def checked_interval(value: Any) -> tuple[float, float]:
    """Two noise levels, the lower first; JSON has them as a list."""
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    numbers = [v for v in pair if isinstance(v, int | float) and not isinstance(v, bool) and not math.isnan(v)]
    if len(pair) != 2 or len(numbers) != 2 or not 0 <= pair[0] < pair[1]:
        raise UsageError(
            f"guidance_interval {printable(repr(value))} is not two noise levels, 0 or more, the lower one first."
        )
    return float(pair[0]), float(pair[1])


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} {printable(repr(value))} is not a whole number from {low} to {high}.")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise UsageError(f"{name} {printable(repr(value))} is not a number from {low:g} to {high:g}.")
