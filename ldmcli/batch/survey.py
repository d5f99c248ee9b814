"""Raw rows as pictures to draw: every field checked, command line and grid worked in, numbers and seeds given."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

from ldmcli.batch.grid import MAX_COMBINATIONS, Grid, checked_grid, parse_grid
from ldmcli.batch.ids import IdIndex
from ldmcli.batch.items import BadRow, Item
from ldmcli.batch.reading import RawRow
from ldmcli.batch.row import MAX_COUNT, MAX_ID, Row, derived_seed
from ldmcli.batch.settings import Fit, Settings
from ldmcli.errors import printable
from ldmcli.spec import GenerationRequest

__all__ = [
    "MAX_COMBINATIONS", "MAX_COUNT", "MAX_ID", "IdIndex", "Survey", "checked_grid", "derived_seed", "items",
    "parse_grid", "survey",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Survey:
    """What an input comes to: `rows` counts the bad ones too, `pixel_steps` is the sum of width × height × steps."""

    rows: int
    images: int
    bad_rows: int
    first_bad: list[BadRow]
    pixel_steps: int


def survey(found: Iterable[Item | BadRow], limit: int) -> Survey:
    """Go through all rows, keeping the first `limit` bad ones."""
    rows = images = bad_rows = pixel_steps = last = 0
    first_bad: list[BadRow] = []
    for one in found:
        rows += one.row != last
        last = one.row
        if isinstance(one, BadRow):
            bad_rows += 1
            if len(first_bad) < limit:
                first_bad.append(one)
            continue
        images += 1
        request = one.request
        pixel_steps += (request.width or 0) * (request.height or 0) * (request.steps or 0)
    return Survey(rows, images, bad_rows, first_bad, pixel_steps)


def items(
    reader: Iterable[RawRow],
    common: GenerationRequest,
    *,
    seed: int,
    count: int = 1,
    grid: Grid = (),
    fit: Fit = lambda request: request,
    check_prompt: Callable[[GenerationRequest], object] | None = None,
    ids: IdIndex | None = None,
) -> Iterator[Item | BadRow]:
    """The pictures of each row in turn, or the row with all that is wrong with it.

    A row's own fields win over `common`, the command line's. The grid's values multiply: a picture for each combination
    in the order given, the last field varying fastest; a field that the row gives itself is not varied. Each
    combination is drawn `count` times, or as often as the row says.

    Seeds: the row's own seed, or the grid's; else one derived from `seed` and the row's id (`derived_seed`), the same
    for all combinations; +0, +1, … for the pictures of one combination. So a row's pictures stay the same wherever in
    the input it stands, if it has an id, and whatever else is there.

    Numbers: a bad row takes those that it would have if it were good; where its count cannot be read, as many as
    the command line gives a row. So mending it does not renumber the rows behind it.

    `fit` fills in the model's own and raises UsageError where it cannot draw the request; it sees settings, with empty
    prompts, once for many rows. `check_prompt` sees the first request of each row, and may raise UsageError too. `ids`
    finds ids that are there twice; leave it out where that was done already.
    """
    grid = checked_grid(grid)
    settings = Settings(common, grid, fit)
    number = 0
    for raw in reader:
        row = Row(raw, count)
        if ids is not None and (taken := ids.claim(raw.row, raw.line, row.given_id)):
            row.problems.append(f"id {printable(repr(row.id))} is taken already by {taken}; ids must differ.")
        variants = settings.of(row.settings, row.own) if not row.problems else None
        if variants is None or variants.problems:
            row.problems += settings.of(row.settings, row.own).problems if variants is None else variants.problems
        else:
            row.check_pictures(variants, seed, check_prompt)
        pictures = row.count * math.prod(len(values) for name, values in grid if name not in row.given)
        if row.problems:
            yield row.bad()
            number += pictures
            continue
        assert variants is not None
        for request in row.requests(variants, seed):
            yield Item(number, raw.row, raw.line, row.id, request, row.extra, pictures)
            number += 1
