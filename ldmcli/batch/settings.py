"""The settings of rows: checked against command line, --grid FIELD=VALUE,VALUE,… and model, once for all rows that
share them."""

import csv
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ldmcli.batch.fields import OWN, PROMPT, REQUEST_FIELDS, SIZE, field_named, from_text, near, normal, problem_of
from ldmcli.errors import LdmError, UsageError, printable
from ldmcli.spec import GenerationRequest

MAX_COMBINATIONS = 10_000
# Options by their letters.
_LETTERS = {"-n": "negative_prompt", "-g": "guidance_scale", "-W": "width", "-H": "height", "-s": "seed", "-i": "image"}

Grid = Sequence[tuple[str, Sequence[Any]]]
Fit = Callable[[GenerationRequest], GenerationRequest]


def parse_grid(text: str) -> tuple[str, tuple[Any, ...]]:
    """The field and its values. A value that holds a comma stands in double quotes. Raises UsageError where there is
    no such field or a value is not one of its."""
    title, equals, rest = text.partition("=")
    name = _LETTERS.get(title.strip(), field_named(title.strip().lstrip("-")))
    fields = [field for field in REQUEST_FIELDS if field != PROMPT]
    if not equals or not title.strip():
        raise UsageError(f"grid {printable(repr(text))} is not FIELD=VALUE,VALUE,…; an example is steps=20,50.")
    if name not in fields:
        advice = near(title, fields) or f"choose from {', '.join(one.replace('_', '-') for one in fields)}."
        if name == SIZE:
            advice = "give one grid of width and one of height."
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
    if (combinations := _combinations(grid)) > MAX_COMBINATIONS:
        raise UsageError(f"the grid has {combinations} combinations; at most {MAX_COMBINATIONS} are accepted.")
    return grid


@dataclasses.dataclass(frozen=True)
class Variants:
    """The requests of rows with certain settings, one for each combination of the grid, without their own texts and
    seed; beside each what the grid says of those. Or what is wrong with the settings."""

    requests: Sequence[tuple[GenerationRequest, Mapping[str, Any]]]
    problems: Sequence[str] = ()

    @functools.cached_property
    def largest_seed(self) -> int:
        """Of those that the grid gives."""
        return max((varied.get("seed", 0) for _, varied in self.requests), default=0)


class Settings:
    """Checks settings of rows against command line, grid and model, and remembers them: most rows have the same."""

    def __init__(self, common: GenerationRequest, grid: Grid, fit: Fit) -> None:
        self._common, self._grid, self._fit = common, grid, fit
        # 1, 1.0 and True are equal, and not all of them are a number of steps: hence typed.
        kept = 2 * MAX_COMBINATIONS // max(1, _combinations(grid))
        self._checked = functools.lru_cache(kept, typed=True)(self._check)

    def of(self, settings: Mapping[str, Any], own: tuple[str, ...]) -> Variants:
        """The requests for a row that gives these settings itself, and the fields `own`, some of OWN."""
        return self._checked(own, *settings, *settings.values())

    def _check(self, own: tuple[str, ...], *given: Any) -> Variants:
        """`given` are names, then their values."""
        settings = dict(zip(given[: len(given) // 2], given[len(given) // 2 :], strict=True))
        alone = [problem for name, value in settings.items() if (problem := problem_of(name, value))]
        if alone:
            return Variants((), alone)
        axes = [(name, values) for name, values in self._grid if name not in settings and name not in own]
        requests: list[tuple[GenerationRequest, Mapping[str, Any]]] = []
        problems: dict[str, None] = {}
        for values in itertools.product(*(values for _, values in axes)):
            varied = dict(zip((name for name, _ in axes), values, strict=True))
            try:
                request = self._fit(dataclasses.replace(self._common, prompt="", **{**settings, **varied}))
            except LdmError as error:
                problems[str(error)] = None
            else:
                requests.append((request, {name: varied[name] for name in OWN if name in varied}))
        return Variants(() if problems else requests, tuple(problems))


def _combinations(grid: Grid) -> int:
    return math.prod(len(values) for _, values in grid)
