"""What differs between the pictures of a grid, as words for captions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmcli.errors import LdmError

_SHOWN = 60  # characters of a value


def caption(request: Mapping[str, Any], varied: Sequence[str]) -> str:
    """The prompt, or the class where there is none, after the values of the fields that a grid varied."""
    last = drawn_from(request)
    others = (name for name in varied if name != "prompt" and (name != "label" or request.get("prompt")))
    values = [f"{name.replace('_', ' ')} {text[:_SHOWN]}" for name in others if (text := valued(request.get(name)))]
    return " · ".join([*values, last])


def drawn_from(request: Mapping[str, Any]) -> str:
    """The prompt, or the class of a picture that has none."""
    label = valued(request.get("label"))
    return valued(request.get("prompt")) or (f"class {label}" if label else "")


def fields_of_grid(folder: Path) -> list[str]:
    """Which fields the grid of the batch run in `folder` varied; none where run.json does not say."""
    from ldmcli.batch.runfile import read_run

    try:
        grid = read_run(folder).settings.get("grid")
    except LdmError:
        return []
    return list(map(str, grid)) if isinstance(grid, dict) else []


def valued(value: Any) -> str:
    """A value as text; "" where it says nothing."""
    if value is None or value == "":
        return ""
    if isinstance(value, list | tuple):
        value = ", ".join(str(one["name"]) if isinstance(one, Mapping) and "name" in one else str(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
