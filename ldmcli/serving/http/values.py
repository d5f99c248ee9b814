"""The fields of a request over HTTP, each looked at once: types as lenient as clients are, ranges as strict as ours."""

import random
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from ldmcli.errors import printable
from ldmcli.serving.http.limits import MAX_PROMPT, Refused
from ldmcli.spec import MAX_SEED

_T = TypeVar("_T")
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(?:\.[0-9]{0,20})?(?:[eE][+-]?[0-9]{1,3})?")
_FLAGS: dict[Any, bool] = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
_RANDOM_SEEDS = 2**32  # short enough to type again


class Values:
    """What a client sent, by field; null counts as left out. A number may be written as text, as forms have it. Every
    method that reads raises Refused naming the field."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = {name: value for name, value in given.items() if value is not None}
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def raw(self, name: str, default: Any = None) -> Any:
        """The value as it was sent."""
        self._read.add(name)
        return self._given.get(name, default)

    def unread(self) -> list[str]:
        """The fields that nothing has read."""
        return [name for name in self._given if name not in self._read]

    def text(self, name: str, default: str = "", most: int = MAX_PROMPT) -> str:
        """Text of at most `most` characters."""
        value = self.raw(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "text")
        if len(value) > most:
            raise Refused(f"{name} has {len(value)} characters; at most {most} are accepted.", field=name)
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`; None where it is left out."""
        value = self._number(name)
        if value is not None and (value != int(value) or not low <= value <= high):
            raise self._wrong(name, f"a whole number from {low} to {high}")
        return None if value is None else int(value)

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number from `low` to `high`; None where it is left out."""
        value = self._number(name)
        if value is not None and not low <= value <= high:
            raise self._wrong(name, f"a number from {low:g} to {high:g}")
        return None if value is None else float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw(name, default)
        found = _FLAGS.get(value.lower()) if isinstance(value, str) else value
        if found in (0, 1):
            return bool(found)
        raise self._wrong(name, "true or false")

    def choice(self, name: str, choices: Mapping[Any, _T], default: Any) -> _T:
        """What one of `choices` stands for."""
        value = self.raw(name, default)
        if isinstance(value, str | int | float) and value in choices:
            return choices[value]
        raise self._wrong(name, f"one of {', '.join(map(str, choices))}")

    def seed(self, name: str = "seed") -> int:
        """A seed; a random one where it is left out or -1."""
        value = self.raw(name)
        if type(value) is int and 0 <= value <= MAX_SEED:
            return value
        seed = self.whole(name, -1, MAX_SEED)
        return random.SystemRandom().randrange(_RANDOM_SEEDS) if seed is None or seed == -1 else seed

    def _number(self, name: str) -> float | None:
        value = self.raw(name)
        if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            value = float(value) if set(value) & set(".eE") else int(value)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300):
            return value
        raise self._wrong(name, "a number")

    def _wrong(self, name: str, wanted: str) -> Refused:
        shown = printable(repr(self._given.get(name)), 60)
        return Refused(f"{name} must be {wanted}, not {shown}.", field=name)
