"""--grid FIELD=VALUE,VALUE,…: values that every row is drawn with in turn."""

import csv
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ldmcli.batch.fields import PROMPT, REQUEST_FIELDS, field_named, from_text, near, normal, problem_of
from ldmcli.errors import UsageError, printable

MAX_COMBINATIONS = 10_000
Grid = Sequence[tuple[str, Sequence[Any]]]


def parse_grid(text: str) -> tuple[str, tuple[Any, ...]]:
    """The field and its values. A value that holds a comma stands in double quotes. Raises UsageError where there is
    no such field or a value is not one of its."""
    title, equals, rest = text.partition("=")
    name = field_named(title)
    fields = [field for field in REQUEST_FIELDS if field != PROMPT]
    if not equals or not title.strip():
        raise UsageError(f"grid {printable(repr(text))} is not FIELD=VALUE,VALUE,…; an example is steps=20,50.")
    if name not in fields:
        advice = near(title, fields) or f"choose from {', '.join(fields)}."
        raise UsageError(f"grid field {printable(repr(title))} is not known; {advice}")
    try:
        cells = next(csv.reader([rest], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise UsageError(f"grid {printable(repr(text))} has quotes that do not match: {error}.") from None
    if not cells:
        raise UsageError(f"grid {printable(repr(text))} has no values; give one or more, with commas between.")
    values = tuple(normal(name, from_text(name, cell)) for cell in cells)
    for value in values:
        if problem := problem_of(name, value):
            raise UsageError(f"grid: {problem}")
        if values.count(value) > 1:
            raise UsageError(f"grid {printable(repr(text))} has {printable(repr(value))} twice; leave out one.")
    return name, values


def checked_grid(grid: Iterable[tuple[str, Sequence[Any]]]) -> Grid:
    """The grid, if its fields differ and its combinations are not too many. Raises UsageError."""
    grid = list(grid)
    names = [name for name, _ in grid]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"the grid has field {name} twice; put all its values into one --grid.")
    if (combinations := math.prod(len(values) for _, values in grid)) > MAX_COMBINATIONS:
        raise UsageError(f"the grid has {combinations} combinations; at most {MAX_COMBINATIONS} are accepted.")
    return grid
