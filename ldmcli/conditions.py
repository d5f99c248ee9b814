"""What a request says to models that are conditioned on something else than prompts: a class, a layout, a map, an
embedding of a picture."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldmcli.checks import MAX_NAME_BYTES, check_text
from ldmcli.errors import UsageError, printable

MAX_LABEL = 1 << 24
MAX_BOXES = 1000
# What a request names with each, by what a model is conditioned on.
CONDITION_FIELDS = ("label", "layout", "map", "image_embedding")
Label = int | str  # a class's number, or its name where the model has a list of them
Box = tuple[Label, float, float, float, float]  # a class, and left, top, right and bottom as shares of the picture


def read_label(value: Any, what: str = "label") -> Label:
    """A class's number or name; a number as text counts as one. Raises UsageError."""
    if isinstance(value, str):
        value = int(value) if value.strip().isascii() and value.strip().isdigit() and len(value) < 20 else value
    if isinstance(value, str):
        check_text(what, value, MAX_NAME_BYTES)
        if value.strip():
            return value.strip()
        raise UsageError(f"{what} is empty; give a class's number or name.")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_LABEL:
        raise UsageError(f"{what} {printable(repr(value), 100)} is no class's number or name.")
    return value


def read_layout(value: Any) -> tuple[Box, ...]:
    """Objects and where they are: a list of {"label": …, "box": [left, top, right, bottom]}, or of five values each.
    Raises UsageError."""
    if not isinstance(value, list | tuple) or len(value) > MAX_BOXES:
        raise UsageError(f'layout is not a list of up to {MAX_BOXES} objects {{"label": 17, "box": [0, 0, 0.5, 1]}}.')
    return tuple(_box(one, f"layout, object {i + 1}") for i, one in enumerate(value))


def _box(value: Any, where: str) -> Box:
    if isinstance(value, Mapping):
        if set(value) != {"label", "box"}:
            raise UsageError(f'{where}: it has to have "label" and "box", and nothing else.')
        value = [value["label"], *(value["box"] if isinstance(value["box"], list | tuple) else ())]
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 5:
        raise UsageError(f"{where}: it is not a class with left, top, right and bottom.")
    label, sides = read_label(value[0], f"{where}: label"), value[1:]
    if not all(isinstance(side, int | float) and not isinstance(side, bool) and 0 <= side <= 1 for side in sides):
        shown = printable(repr(list(sides)), 100)
        raise UsageError(f"{where}: the box {shown} is not inside the picture, whose sides go from 0 to 1.")
    left, top, right, bottom = map(float, sides)
    if left >= right or top >= bottom:
        raise UsageError(f"{where}: the box [{left:g}, {top:g}, {right:g}, {bottom:g}] has no area.")
    return label, left, top, right, bottom
