"""One raw row taken apart and checked, and the requests it comes to."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ldmcli.batch.fields import EXTRAS, IDS, OWN, PROMPT, REQUEST_FIELDS, problem_of, unknown
from ldmcli.batch.items import BadRow
from ldmcli.batch.reading import RawRow
from ldmcli.batch.settings import MAX_PROBLEMS, Variants
from ldmcli.errors import UsageError, printable
from ldmcli.spec import MAX_PROMPT_BYTES, MAX_SEED, GenerationRequest

MAX_COUNT = 1_000_000
MAX_ID = 256
_FIELDS = frozenset(REQUEST_FIELDS)


def derived_seed(seed: int, id: str) -> int:
    """The seed of a row that gives none: 32 bits of a hash of the run's seed and its id, so as to be short."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{id}".encode()).digest()[:4], "big")


class Row:
    """One raw row taken apart: its id, count, extra and fields, and what is wrong with them."""

    def __init__(self, raw: RawRow, count: int) -> None:
        self.raw = raw
        self.problems: list[str] = [raw.problem] if raw.problem else []
        fields = dict(raw.fields or {})
        self.given = frozenset(fields)
        self.extra = self._extra(fields)
        self.given_id = self._id(fields)
        self.id = str(raw.row) if self.given_id is None else self.given_id
        self.count = self._count(fields, count)
        if raw.fields is not None and PROMPT not in fields:
            self.problems.append('the row has no prompt; give one, or "" to draw without.')
        self.fields: dict[str, Any] = {}
        unknown_names = []
        for name, value in fields.items():
            if name in _FIELDS:
                self._take(name, value)
            else:
                unknown_names.append(name)
        self.problems += map(unknown, unknown_names[:MAX_PROBLEMS])
        self.own = tuple(name for name in OWN if name in self.fields)
        self.settings = {name: value for name, value in self.fields.items() if name not in OWN}

    def bad(self) -> BadRow:
        """The row with its problems, each once."""
        found = list(dict.fromkeys(self.problems))
        if len(found) > MAX_PROBLEMS:
            found[MAX_PROBLEMS:] = [f"{len(found) - MAX_PROBLEMS} more problems."]
        prompt = (self.raw.fields or {}).get(PROMPT)
        return BadRow(self.raw.row, self.raw.line, self.id, tuple(found), prompt if isinstance(prompt, str) else "")

    def check_pictures(
        self, variants: Variants, seed: int, check_prompt: Callable[[GenerationRequest], object] | None
    ) -> None:
        """What can only be seen of the pictures themselves: seeds that count up too far, a prompt that is too long."""
        # A derived one is far from the end.
        largest = self.fields["seed"] if "seed" in self.own else variants.largest_seed
        if largest + self.count - 1 > MAX_SEED:
            self.problems.append(f"seed {largest} with count {self.count} goes past {MAX_SEED}, the largest seed.")
        elif check_prompt is not None:
            try:
                check_prompt(next(self.requests(variants, seed)))
            except UsageError as error:
                self.problems.append(str(error))

    def requests(self, variants: Variants, seed: int) -> Iterator[GenerationRequest]:
        """One for each picture."""
        own = {name: self.fields[name] for name in self.own}
        usual = own["seed"] if "seed" in own else derived_seed(seed, self.id)
        for request, varied in variants.requests:
            first = varied.get("seed", usual)
            for i in range(self.count):
                own["seed"] = first + i
                yield _with_own(request, own)

    def _take(self, name: str, value: Any) -> None:
        """Keep the value of a field; what every row has of its own is checked here, the rest with the settings."""
        if isinstance(value, list | dict):
            self.problems.append(problem_of(name, value) or f"{name} {printable(repr(value))} is not a single value.")
            return
        self.fields[name] = value
        if name in OWN and (problem := _own_problem(name, value)):
            self.problems.append(problem)

    def _id(self, fields: dict[str, Any]) -> str | None:
        """The id as text; None where there is none, or none that can be used."""
        given = [fields.pop(name) for name in IDS if name in fields]
        if not given:
            return None
        value = given[0]
        if len(given) == 2:
            self.extra = {**self.extra, IDS[1]: _as_text(given[1])}
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
            if name not in fields:
                continue
            value = fields.pop(name)
            if isinstance(value, dict):
                extra |= {key: _as_text(inner) for key, inner in value.items() if key not in extra}
            else:
                self.problems.append(f"{name} {printable(repr(value))} is not a JSON object.")
        for key, text in extra.items():
            if not (_is_sound(key) and _is_sound(text)):
                self.problems.append(f"{printable(repr(key))} holds a NUL character or a lone surrogate; remove it.")
        return extra


def _own_problem(name: str, value: Any) -> str:
    """As `problem_of`, for what every row has: the usual is seen at a glance."""
    if name == "seed":
        fine = type(value) is int and 0 <= value <= MAX_SEED
    else:
        fine = type(value) is str and value.isascii() and len(value) <= MAX_PROMPT_BYTES and "\0" not in value
    return "" if fine else problem_of(name, value)


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
    if text.isascii():
        return "\0" not in text
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)
