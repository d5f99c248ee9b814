"""The fields of a small JSON file, read one by one: what is no value of its kind is refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ldmcli.disk.opening import read_json
from ldmcli.errors import BadDataError, printable

MAX_CONFIG_BYTES = 1 << 20
_MAX_WHOLE = 1 << 24


class Fields:
    """The fields of one JSON file, each read with its type checked. `usual` names the values that mean "as usual" of
    fields that have others; `values` are the file's where they were read before."""

    def __init__(
        self, path: Path, usual: Mapping[str, tuple[Any, ...]], values: Mapping[str, Any] | None = None
    ) -> None:
        self.shown = printable(str(path))
        self._fields = read_json(path, MAX_CONFIG_BYTES) if values is None else values
        self._usual = usual

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields.get(name, default)

    def require_usual(self) -> None:
        for name, values in self._usual.items():
            if name in self._fields and self._fields[name] not in values:
                shown = printable(json.dumps(self._fields[name]))
                raise BadDataError(f"{self.shown}: {name} is {shown}, which this version cannot run.")

    def only(self, name: str, found: tuple[str, ...], known: set[str]) -> None:
        for value in found:
            if value not in known:
                raise BadDataError(
                    f"{self.shown}: {name} holds {printable(repr(value))}, which this version cannot run; it knows "
                    f"{', '.join(sorted(known))}."
                )

    def whole(self, name: str, default: int, low: int = 1, high: int = _MAX_WHOLE) -> int:
        return self._whole(name, self._fields.get(name, default), low, high)

    def wholes(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self._fields.get(name, default)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= 16:
            self.refuse(name, value, "a list of 1 to 16 whole numbers")
        return tuple(self._whole(name, item, 1) for item in value)

    def names(self, name: str, default: tuple[str, ...], count: int) -> tuple[str, ...]:
        value = self._fields.get(name, default)
        if not isinstance(value, list | tuple) or len(value) != count or not all(isinstance(v, str) for v in value):
            self.refuse(name, value, f"a list of {count} names")
        return tuple(value)

    def per_level(self, name: str, default: int, levels: int) -> tuple[int, ...]:
        """One number for all levels, or a list of one each."""
        value = self._fields.get(name, default)
        if isinstance(value, list) and len(value) != levels:
            self.refuse(name, value, f"one number, or a list of {levels}")
        values = value if isinstance(value, list) else [value] * levels
        return tuple(self._whole(name, item, 1) for item in values)

    def number(self, name: str, default: float) -> float:
        return self._number(name, self._fields.get(name, default))

    def within(self, name: str, default: float, low: float, high: float) -> float:
        value = self.number(name, default)
        if not low <= value <= high:
            self.refuse(name, value, f"a number from {low:g} to {high:g}")
        return value

    def numbers(self, name: str, count: int) -> tuple[float, ...] | None:
        """A list of `count` numbers, or None."""
        value = self._fields.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            self.refuse(name, value, f"a list of {count} numbers")
        return tuple(self._number(name, item) for item in value)

    def choice(self, name: str, default: str, known: set[str]) -> str:
        """One of the words that are known."""
        value = str(self._fields.get(name, default))
        self.only(name, (value,), known)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._fields.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return bool(value)

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            self.refuse(name, value, "a number")
        return float(value)

    def _whole(self, name: str, value: Any, low: int, high: int = _MAX_WHOLE) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, value, f"a whole number from {low} to {high}")
        return int(value)

    def refuse(self, name: str, value: Any, wanted: str) -> NoReturn:
        raise BadDataError(f"{self.shown}: {name} is {printable(repr(value))}, not {wanted}.")
