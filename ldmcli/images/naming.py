"""Names of picture files, made by a pattern such as {row:05d}-{id}-{seed}: of safe characters only."""

import dataclasses
import re
import string
from collections.abc import Mapping
from typing import Any

from ldmcli.errors import UsageError, printable
from ldmcli.frozen import frozen
from ldmcli.spec import GenerationRequest

OWN = ("row", "id", "number")  # what a pattern can hold beside the fields of a request
MAX_LENGTH = 180  # of a name without its ending, which file systems hold with a number behind it
_MAX_PATTERN = 400
_FIELDS = (*OWN, *(field.name for field in dataclasses.fields(GenerationRequest)))
_SPEC = re.compile(r"(0?[1-9][0-9]?)?(d|\.[0-9]f|[fg]|\.[0-9]{1,3})?", re.ASCII)
_LITERAL = re.compile(r"[\w.+=,@-]*", re.ASCII)
_UNSAFE = re.compile(r"[^\w.+=,@-]+", re.ASCII)
SAFE_NAME = r"[\w+=,@][\w.+=,@-]{0,400}"


@frozen
class NamePattern:
    """How files are named: text and {FIELD} or {FIELD:FORMAT}, where FIELD is one of a request's, the `row` and the
    `number` of the picture, both from 1, or the row's `id`; FORMAT such as 05d, .1f, or .40 for so many characters.

    Raises UsageError where the pattern holds anything else.
    """

    text: str

    def __post_init__(self) -> None:
        shown = printable(repr(self.text))
        try:
            parts = list(string.Formatter().parse(self.text[:_MAX_PATTERN]))
        except ValueError as error:
            raise UsageError(f"name {shown} has braces that do not match: {error}.") from None
        if len(self.text) > _MAX_PATTERN or not any(name for _, name, _, _ in parts):
            raise UsageError(f"name {shown} is no pattern with fields; an example is {{row:05d}}-{{id}}-{{seed}}.")
        for literal, name, spec, conversion in parts:
            if not _LITERAL.fullmatch(literal):
                raise UsageError(f"name {shown} has characters other than letters, digits and . _ - + = , @ in it.")
            if name is None:
                continue
            if name.replace("-", "_") not in _FIELDS:
                from difflib import get_close_matches

                near = get_close_matches(name, _FIELDS, 1, 0.6)
                advice = f"did you mean {near[0]}?" if near else f"it may hold {', '.join(_FIELDS[:8])} and the like."
                raise UsageError(f"name {shown} has a field {printable(repr(name))} that there is none of; {advice}")
            if conversion or not _SPEC.fullmatch(spec or ""):
                raise UsageError(f"name {shown}: {printable(repr(spec))} is no format such as 05d, .1f or .40.")

    def of(self, request: Mapping[str, Any], *, row: int, id: str, number: int) -> str:
        """The name of a picture, without an ending: safe, not empty, and not hidden."""
        values = {**request, "row": row, "id": id, "number": number}
        made = "".join(
            literal + (_safe(_formatted(values.get(name.replace("-", "_")), spec or "")) if name is not None else "")
            for literal, name, spec, _ in string.Formatter().parse(self.text)
        )
        return made[:MAX_LENGTH].strip(".-") or f"{row}-{number}"


def _formatted(value: Any, spec: str) -> str:
    """A value as the format says, as far as that goes with it: a number in digits, all else cut to a length."""
    if value is None:
        return ""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and spec.endswith("d"):
        return format(round(value), spec) if abs(value) < 1e300 else str(value)
    if number and spec.endswith(("f", "g")):
        return format(float(value), spec)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if number:
        return text.rjust(int(spec), "0" if spec.startswith("0") else " ") if spec.isdigit() else text
    digits = spec.partition(".")[2].rstrip("f")
    return text[: int(digits)] if digits else text


def _safe(text: str) -> str:
    return _UNSAFE.sub("-", text).strip("-")
