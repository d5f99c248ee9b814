"""What a row may say, by name: the fields of a request and a few more, and how text becomes their values."""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Any

from ldmcli.errors import UsageError, printable
from ldmcli.spec import GenerationRequest

PROMPT = "prompt"
TEXTS = (PROMPT, "negative_prompt")  # kept as they are written, spaces included
OWN = (*TEXTS, "seed")  # what rows usually differ in; none of it bears on whether a model can draw the rest
REQUEST_FIELDS = tuple(field.name for field in dataclasses.fields(GenerationRequest))
IDS = ("id", "custom_id")
COLUMNS = (*REQUEST_FIELDS, *IDS, "count")
EXTRAS = ("extra", "metadata")  # objects in a JSON row whose content the manifest keeps
_TYPES = {field.name: field.type for field in dataclasses.fields(GenerationRequest)} | {"count": int}
_WHOLE = {name for name, kind in _TYPES.items() if kind in (int, int | None)}
_NUMBERS = {name for name, kind in _TYPES.items() if kind in (float, float | None)}
_WHOLE_TEXT = re.compile(r"[+-]?[0-9]{1,40}")
_NUMBER_TEXT = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan|inf(?:inity)?)", re.IGNORECASE)
# A field that is only looked at beside another, with a value of that one which takes all there are.
_BESIDE: dict[str, dict[str, Any]] = {"schedule": {"sampler": "euler"}}


def column_name(text: str) -> str:
    """The field that a column's title or an option names: `Guidance Scale` and `guidance-scale` are guidance_scale."""
    return re.sub(r"[\s-]+", "_", text.strip().lower())


def from_text(name: str, text: str) -> Any:
    """The value of a field written as text; the text itself where it is none, for the check of the field to refuse."""
    if name in TEXTS:
        return text
    text = text.strip()
    if name in _WHOLE and _WHOLE_TEXT.fullmatch(text):
        return int(text)
    if name in _NUMBERS and _NUMBER_TEXT.fullmatch(text):
        return float(text)
    if name == "guidance_interval":
        with contextlib.suppress(ValueError):
            low, high = text.split(":")
            return float(low), float(high)
    return text


def normal(name: str, value: Any) -> Any:
    """The value as its field holds it: 7 and 7.0 are one guidance scale, and an account of it writes one of them."""
    if name in _NUMBERS and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    return tuple(value) if name == "guidance_interval" and isinstance(value, list) else value


def problem_of(name: str, value: Any) -> str:
    """What is wrong with a field of a request, looked at alone; "" where nothing is."""
    try:
        GenerationRequest(**{PROMPT: ""} | _BESIDE.get(name, {}) | {name: value})
    except UsageError as error:
        return str(error)
    except RecursionError:
        return f"{name} is nested too deeply; give it plainly."
    return ""


def near(name: str, names: Iterable[str]) -> str:
    """Advice for a name that is not known: those like it."""
    found = difflib.get_close_matches(column_name(name[:100]), list(names), 3, 0.7)
    return f"did you mean {' or '.join(found)}?" if found else ""


def unknown(name: str) -> str:
    """The sentence on a field that there is none of in a JSON row."""
    advice = near(name, COLUMNS) or f"what is no field goes into an object {EXTRAS[0]}."
    return f"unknown field {printable(repr(name))}: {advice}"
