"""Raw rows as pictures to draw: every field checked, command line and grid worked in, numbers and seeds given."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ldmcli.batch.fields import EXTRAS, IDS, OWN, PROMPT, REQUEST_FIELDS, located, own_problem, problem_of, unknown
from ldmcli.batch.items import BadRow, Item
from ldmcli.batch.reading import RawRow
from ldmcli.batch.scratch import IdIndex, NameIndex
from ldmcli.batch.settings import Fit, Grid, Settings, Variants, checked_grid
from ldmcli.conditioning.dynamic import DynamicPrompts
from ldmcli.conditions import CONDITION_FIELDS
from ldmcli.errors import LdmError, printable
from ldmcli.hires import hires_size
from ldmcli.images.naming import NamePattern
from ldmcli.spec import MAX_SEED, GenerationRequest

MAX_COUNT = 1_000_000
MAX_ID = 256
_MAX_PROBLEMS = 20  # reported of one row
_FIELDS = frozenset(REQUEST_FIELDS)


@dataclasses.dataclass(frozen=True)
class Survey:
    """What an input comes to: `rows` counts the bad ones too, `pixel_steps` is the sum of width × height × steps of
    all passes."""

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
        else:
            images += 1
            request = one.request
            width, height = request.width or 0, request.height or 0
            pixel_steps += width * height * (request.steps or 0)
            if request.hires is not None:
                pixel_steps += math.prod(hires_size(request.hires, width, height)) * (request.hires_steps or 0)
    return Survey(rows, images, bad_rows, first_bad, pixel_steps)


def items(
    reader: Iterable[RawRow],
    common: GenerationRequest,
    *,
    seed: int,
    count: int = 1,
    grid: Grid = (),
    folder: Path = Path(),
    fit: Fit = lambda request: request,
    check_prompt: Callable[[GenerationRequest], object] = lambda request: None,
    dynamic: DynamicPrompts | None = None,
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

    Paths of pictures in rows start from `folder`.

    `fit` fills in the model's own and raises LdmError where it cannot draw the request; it sees settings, with empty
    prompts, once for many rows. `check_prompt` sees the first request of each row, and may raise LdmError too.

    `dynamic` draws prompts by lot, for each picture by its seed; `check_prompt` then sees all of them, and an item's
    `extra` has the `template` that was drawn from.
    """
    grid = checked_grid(grid)
    settings = Settings(common, grid, fit)
    ids, number = IdIndex(), 0
    for raw in reader:
        row = _Row(raw, count, folder, dynamic)
        if taken := ids.claim(raw.row, raw.line, row.given_id):
            row.problems.append(f"id {printable(repr(row.id))} is taken already by {taken}; ids must differ.")
        variants = settings.of(row.settings, row.own)
        row.problems += variants.problems
        if not row.problems:
            row.check_pictures(variants, seed, check_prompt)
        pictures = row.count * math.prod(len(values) for name, values in grid if name not in row.given)
        if row.problems:
            yield row.bad()
            number += pictures
            continue
        for request in row.requests(variants, seed):
            yield Item(number, raw.row, raw.line, row.id, request, row.extra_of(request), pictures)
            number += 1


def named(found: Iterable[Item | BadRow], pattern: NamePattern) -> Iterator[Item | BadRow]:
    """The same with names for their files; of one that is taken already, letter case aside, the next free one with a
    number behind it."""
    names = NameIndex()
    for one in found:
        if isinstance(one, Item):
            name = pattern.of(vars(one.request), row=one.row, id=one.id, number=one.number + 1)
            one = dataclasses.replace(one, name=names.claim(name))
        yield one


def shard(found: Iterable[Item | BadRow], part: tuple[int, int]) -> Iterator[Item | BadRow]:
    """A part (number from 1, of how many): every so many-th row, all pictures of a row together."""
    number, count = part
    return (one for one in found if (one.row - number) % count == 0)


def derived_seed(seed: int, id: str) -> int:
    """The seed of a row that gives none: 32 bits of a hash of the run's seed and its id, so as to be short."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{id}".encode()).digest()[:4], "big")


class _Row:
    """One raw row taken apart: its id, count, extra and fields, and what is wrong with them. `settings` are what many
    rows have in common, and `own` which of the other fields it gives."""

    def __init__(self, raw: RawRow, count: int, folder: Path, dynamic: DynamicPrompts | None = None) -> None:
        self.raw, self._dynamic = raw, dynamic
        self.problems: list[str] = [raw.problem] if raw.problem else []
        fields = dict(raw.fields or {})
        self.given = frozenset(fields)
        self.extra = self._extra(fields)
        self.given_id = self._id(fields)
        self.id = str(raw.row) if self.given_id is None else self.given_id
        self.count = self._count(fields, count)
        if fields.keys() & set(CONDITION_FIELDS):
            fields.setdefault(PROMPT, "")
        if raw.fields is not None and PROMPT not in fields:
            self.problems.append('the row has no prompt; give one, or "" to draw without.')
        self.settings: dict[str, Any] = {}
        self._own: dict[str, Any] = {}
        unknown_names = []
        for name, value in fields.items():
            if name not in _FIELDS:
                unknown_names.append(name)
            elif isinstance(value, list | dict):
                one = f"{name} {printable(repr(value))} is not a single value."
                self.problems.append(problem_of(name, value) or one)
            elif name not in OWN:
                self.settings[name] = located(name, value, folder)
            else:
                self._own[name] = value
                if problem := own_problem(name, value):
                    self.problems.append(problem)
        self.problems += map(unknown, unknown_names[:_MAX_PROBLEMS])
        self.own = tuple(self._own)

    def bad(self) -> BadRow:
        """The row with its problems, each once."""
        found = list(dict.fromkeys(self.problems))
        if len(found) > _MAX_PROBLEMS:
            found[_MAX_PROBLEMS:] = [f"{len(found) - _MAX_PROBLEMS} more problems."]
        prompt = (self.raw.fields or {}).get(PROMPT)
        return BadRow(self.raw.row, self.raw.line, self.id, tuple(found), prompt if isinstance(prompt, str) else "")

    def check_pictures(
        self, variants: Variants, seed: int, check_prompt: Callable[[GenerationRequest], object]
    ) -> None:
        """What can only be seen of the pictures themselves: seeds that count up too far, a prompt that is too long."""
        # A derived one is far from the end.
        largest = self._own.get("seed", variants.largest_seed)
        if largest + self.count - 1 > MAX_SEED:
            self.problems.append(f"seed {largest} with count {self.count} goes past {MAX_SEED}, the largest seed.")
            return
        try:
            for request in itertools.islice(self.requests(variants, seed), None if self._dynamic else 1):
                check_prompt(request)
        except LdmError as error:
            self.problems.append(str(error))

    def requests(self, variants: Variants, seed: int) -> Iterator[GenerationRequest]:
        """One for each picture."""
        own = dict(self._own)
        usual = own["seed"] if "seed" in own else derived_seed(seed, self.id)
        for request, varied in variants.requests:
            first = varied.get("seed", usual)
            for i in range(self.count):
                own["seed"] = first + i
                made = _with_own(request, own)
                yield self._dynamic.drawn(made) if self._dynamic else made

    def extra_of(self, request: GenerationRequest) -> Mapping[str, str]:
        """What the manifest keeps beside the request: the prompt before it was drawn by lot, too."""
        prompt = self._own.get(PROMPT)
        return self.extra if prompt == request.prompt else {"template": str(prompt)} | self.extra

    def _id(self, fields: dict[str, Any]) -> str | None:
        """The id as text; None where there is none, or none that can be used."""
        given = [fields.pop(name) for name in IDS if name in fields]
        if not given:
            return None
        value = given[0]
        if len(given) == 2:
            self.extra[IDS[1]] = _as_text(given[1])
        if isinstance(value, bool) or not isinstance(value, str | int):
            self.problems.append(f"id {printable(repr(value))} is neither text nor a whole number.")
            return None
        text = str(value)
        if not 0 < len(text) <= MAX_ID:
            self.problems.append(f"id {printable(repr(text))} is not 1 to {MAX_ID} characters long.")
        elif not _is_sound(text):
            self.problems.append(f"id {printable(repr(text))} holds a NUL character or a lone surrogate; remove it.")
        else:
            return text
        return None

    def _count(self, fields: dict[str, Any], count: int) -> int:
        value = fields.pop("count", count)
        if type(value) is int and 1 <= value <= MAX_COUNT:
            return value
        self.problems.append(f"count {printable(repr(value))} is not a whole number from 1 to {MAX_COUNT}.")
        return count

    def _extra(self, fields: dict[str, Any]) -> dict[str, str]:
        """What the row holds that is no field of a request, as text."""
        extra: dict[str, str] = {}
        for name in EXTRAS:
            value = fields.pop(name, {})
            if isinstance(value, dict):
                extra |= {key: _as_text(inner) for key, inner in value.items() if key not in extra}
            else:
                self.problems.append(f"{name} {printable(repr(value))} is not a JSON object.")
        for key, text in extra.items():
            if not (_is_sound(key) and _is_sound(text)):
                self.problems.append(f"{printable(repr(key))} holds a NUL character or a lone surrogate; remove it.")
        return extra


def _with_own(request: GenerationRequest, own: Mapping[str, Any]) -> GenerationRequest:
    """`dataclasses.replace` without checking again what was checked: a tenth of the time, which a million rows feel."""
    made = object.__new__(GenerationRequest)
    vars(made).update(vars(request))
    vars(made).update(own)
    return made


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_sound(text: str) -> bool:
    """Whether the text can be written to a file and read again by anyone."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text))
