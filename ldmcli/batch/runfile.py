"""run.json: what a run draws, and with what; so that the same command goes on and another one is refused."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ldmcli.disk.opening import bad_file, open_regular, shown
from ldmcli.disk.writing import write_exact
from ldmcli.errors import BadDataError, MissingInputError, printable

RUN_FILE = "run.json"
STDIN = "stdin"
_FORMAT = 1
_MAX_BYTES = 1 << 26  # a longer one is cut off, and so no JSON
_CURE = "restore it, or choose another folder"
_SHOWN_DIFFERENCES = 5
# Shown beside a difference of the same part, none by themselves: a file that was moved is the same file.
_NAMES = {"input.name", "model.name", "model.path"}
_UNCOMPARED = {"rows", "versions"}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """All that the pictures of a run depend on, in plain JSON values.

    `input` holds name, sha256 and bytes of the file, or only the name "stdin". `model` holds name and sha256, and so
    on for whatever else has weights. `settings` are the request that rows start from and the options that change
    pixels. `rows` is how many rows the run is to account for, of its shard where it has one; None while nobody knows.
    """

    input: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: int | None = None
    shard: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def open_run(
    folder: Path,
    identity: RunIdentity,
    *,
    extend: bool = False,
    is_extended: Callable[[Mapping[str, Any]], bool] = lambda before: False,
) -> None:
    """Begin the run `identity` in `folder`, or see that it is the one begun there.

    With `extend`, the input may have grown: `is_extended` gets the `input` of before and says whether today's only
    adds rows after it; run.json then names today's. Raises BadDataError naming the differences, or where run.json is
    damaged or missing beside manifests; and as `write_exact` does.
    """
    try:
        before = read_run(folder)
    except MissingInputError:
        if any((folder / "manifest").glob("*.jsonl")):
            raise BadDataError(
                f"{shown(folder)} holds pictures of a run but no {RUN_FILE}, which says of which; {_CURE}."
            ) from None
        return _write(folder, identity)
    differences = _differences(before, identity)
    if differences:
        only_input = all(_is_of_input(name, values[0]) for name, values in differences.items())
        if not (extend and only_input and is_extended(before.input)):
            raise BadDataError(_refusal(folder, differences, only_input=only_input, extend=extend))
    if before.versions != identity.versions:
        changed = _listed(dict(_changes(before.versions, identity.versions)))
        _log.warning("%s was begun with other versions (%s); pictures may differ a little", shown(folder), changed)
    if differences or identity.rows not in (None, before.rows):
        _write(folder, dataclasses.replace(identity, versions=before.versions))
    return None


def read_run(folder: Path) -> RunIdentity:
    """What run.json says. Raises MissingInputError where there is none, BadDataError where it is damaged."""
    path = folder / RUN_FILE
    if not os.path.lexists(path):
        raise MissingInputError(f"{shown(folder)} holds no run of ldm batch: there is no {RUN_FILE} in it.")
    try:
        with open_regular(path, ("", _CURE)) as file:
            fields = json.loads(file.read(_MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise bad_file(path, f"is damaged: {error}", _CURE) from None
    if isinstance(fields, dict) and fields.get("format") != _FORMAT:
        found = printable(repr(fields.get("format")), 80)
        raise bad_file(path, f"has format {found}, and this version knows {_FORMAT}", "use the version that began it")
    identity = _identity(fields)
    if identity is None:
        raise bad_file(path, "is damaged: it lacks fields, or has them of the wrong type", _CURE)
    return identity


def record_rows(folder: Path, rows: int) -> None:
    """Put into run.json how many rows there are, for an input that does not say so before its end."""
    identity = read_run(folder)
    if identity.rows != rows:
        _write(folder, dataclasses.replace(identity, rows=rows))


def _write(folder: Path, identity: RunIdentity) -> None:
    fields = {"format": _FORMAT} | dataclasses.asdict(identity)
    write_exact(folder / RUN_FILE, json.dumps(fields, indent=2).encode("ascii") + b"\n", overwrite=True)


def _identity(fields: Any) -> RunIdentity | None:
    """The fields checked as far as anything is built on them; None where something is amiss."""
    with contextlib.suppress(TypeError, AttributeError):
        identity = RunIdentity(**{name: value for name, value in fields.items() if name != "format"})
        mappings = (identity.input, identity.model, identity.settings, identity.versions)
        rows = 0 if identity.rows is None else identity.rows
        if type(rows) is int and rows >= 0 and all(isinstance(mapping, dict) for mapping in mappings):
            return identity
    return None


def _differences(before: RunIdentity, now: RunIdentity) -> dict[str, tuple[Any, Any]]:
    """The fields by which two runs are not the same, each with both values; names only of parts that differ."""
    one, other = (json.loads(json.dumps(dataclasses.asdict(run))) for run in (before, now))  # tuples become lists
    for name in _UNCOMPARED:
        del one[name], other[name]
    found = dict(_changes(one, other))
    parts = {name.partition(".")[0] for name in found.keys() - _NAMES}
    return {name: values for name, values in found.items() if name.partition(".")[0] in parts}


def _is_of_input(name: str, before: Any) -> bool:
    """Whether rows that were added to the input can make this difference: theirs may use embeddings of their own."""
    return name.startswith("input.") or (name.startswith("model.embeddings") and before is None)


def _changes(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each dotted name whose values differ, with both; None stands for what is not there."""
    for name in {**one, **other}:
        values = one.get(name), other.get(name)
        if isinstance(values[0], dict) and isinstance(values[1], dict):
            yield from _changes(values[0], values[1], f"{prefix}{name}.")
        elif values[0] != values[1]:
            yield f"{prefix}{name}", values


def _refusal(folder: Path, differences: Mapping[str, tuple[Any, Any]], *, only_input: bool, extend: bool) -> str:
    cure = "choose another folder, or run it with what it was begun with"
    if only_input and extend:
        cure = "--extend takes rows added after the old ones, which must be unchanged: restore them or " + cure
    elif only_input:
        cure += ", or give --extend if rows were only added at the end of the input"
    return f"{shown(folder)} holds another run ({_listed(differences)}); {cure}."


def _listed(differences: Mapping[str, tuple[Any, Any]]) -> str:
    listed = [f"{printable(name, 80)}: {_value(old)} -> {_value(new)}" for name, (old, new) in differences.items()]
    more = len(listed) - _SHOWN_DIFFERENCES
    return ", ".join(listed[:_SHOWN_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")


def _value(value: Any) -> str:
    return "none" if value is None else printable(json.dumps(value, ensure_ascii=False), 80)
