"""What differs between the pictures of a grid, as words for captions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmcli.errors import LdmError

_SHOWN = 60  # characters of a value


def caption(request: Mapping[str, Any], varied: Sequence[str]) -> str:
    """The prompt, after the values of the fields that a grid varied."""
    values = [part for name in varied if name != "prompt" and (part := _valued(request, name))]
    return " · ".join([*values, str(request.get("prompt", ""))])


def details(request: Mapping[str, Any], varied: Sequence[str], shown: Sequence[str]) -> list[str]:
    """The values of those fields that a grid varied and that are not shown anyway."""
    return [part for name in varied if name not in shown and (part := _valued(request, name))]


def fields_of_grid(folder: Path) -> list[str]:
    """Which fields the grid of the batch run in `folder` varied; none where run.json does not say."""
    from ldmcli.batch.runfile import read_run

    try:
        grid = read_run(folder).settings.get("grid")
    except LdmError:
        return []
    return list(map(str, grid)) if isinstance(grid, dict) else []


def _valued(request: Mapping[str, Any], name: str) -> str:
    value = request.get(name)
    if value is None or value == "":
        return ""
    if isinstance(value, list | tuple):
        value = ", ".join(str(one["name"]) if isinstance(one, Mapping) and "name" in one else str(one) for one in value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{name.replace('_', ' ')} {text[:_SHOWN]}"
