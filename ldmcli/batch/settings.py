"""The settings of rows: checked against command line, grid and model, once for all the rows that share them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from ldmcli.batch.fields import OWN, problem_of
from ldmcli.batch.grid import MAX_COMBINATIONS, Grid
from ldmcli.errors import UsageError
from ldmcli.spec import GenerationRequest

MAX_PROBLEMS = 20  # reported of one row
_MAX_KEPT = 2 * MAX_COMBINATIONS  # checked settings that are remembered, all combinations counted

Fit = Callable[[GenerationRequest], GenerationRequest]


@dataclasses.dataclass(frozen=True)
class Variants:
    """The requests of rows with certain settings, one for each combination of the grid, without their own texts and
    seed; beside each what the grid says of those. Or what is wrong with the settings."""

    requests: tuple[tuple[GenerationRequest, Mapping[str, Any]], ...]
    problems: tuple[str, ...] = ()

    @functools.cached_property
    def largest_seed(self) -> int:
        """Of those that the grid gives."""
        return max((varied.get("seed", 0) for _, varied in self.requests), default=0)


class Settings:
    """Checks settings of rows against command line, grid and model, and remembers them: most rows have the same."""

    def __init__(self, common: GenerationRequest, grid: Grid, fit: Fit) -> None:
        self._common, self._grid, self._fit = common, grid, fit
        self._seen: dict[Any, Variants] = {}
        self._kept = 0

    def of(self, settings: Mapping[str, Any], own: tuple[str, ...]) -> Variants:
        """The requests for a row that gives these settings itself, and the fields `own`, some of OWN."""
        # 1, 1.0 and True are equal, and not all of them are a number of steps.
        key = (own, tuple((name, type(value), repr(value)) for name, value in settings.items()))
        found = self._seen.get(key)
        if found is None:
            found = self._check(settings, own)
            self._kept += 1 + len(found.requests)
            if self._kept > _MAX_KEPT:
                self._seen.clear()
                self._kept = 1 + len(found.requests)
            self._seen[key] = found
        return found

    def _check(self, settings: Mapping[str, Any], own: tuple[str, ...]) -> Variants:
        alone = [problem for name, value in settings.items() if (problem := problem_of(name, value))]
        if alone:
            return Variants((), tuple(alone))
        axes = [(name, values) for name, values in self._grid if name not in settings and name not in own]
        names = [name for name, _ in axes]
        requests: list[tuple[GenerationRequest, Mapping[str, Any]]] = []
        problems: dict[str, None] = {}
        for values in itertools.product(*(values for _, values in axes)):
            varied = dict(zip(names, values, strict=True))
            try:
                request = self._fit(dataclasses.replace(self._common, prompt="", **{**settings, **varied}))
            except UsageError as error:
                problems[str(error)] = None
                if len(problems) == MAX_PROBLEMS:
                    break
            else:
                requests.append((request, {name: varied[name] for name in OWN if name in varied}))
        return Variants(() if problems else tuple(requests), tuple(problems))
