"""Accounts of rows for as long as a run lasts, on disk in a temporary file without a name, so that they cost no
memory."""

import hashlib
import sqlite3
import threading
from collections.abc import Iterable
from typing import Any

from ldmcli.errors import StorageError, printable


class Scratch:
    """An empty database with these tables. Threads take turns. Raises StorageError where there is no room for it."""

    def __init__(self, *tables: str) -> None:
        self._lock = threading.Lock()
        self._store = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for command in ("PRAGMA journal_mode=OFF", "PRAGMA cache_size=-8192", *tables, "BEGIN"):
            self._store.execute(command)

    def __call__(self, command: str, *values: Any) -> tuple[Any, ...] | None:
        """Run a command, and return its first row."""
        try:  # no context manager: a million rows feel it
            with self._lock:
                row: tuple[Any, ...] | None = self._store.execute(command, values).fetchone()
                return row
        except sqlite3.Error as error:
            raise _no_room(error) from None

    def change(self, command: str, rows: Iterable[tuple[Any, ...]]) -> int:
        """Run a command for each of the rows, and return how many of the table it changed."""
        try:
            with self._lock:
                return self._store.executemany(command, rows).rowcount
        except sqlite3.Error as error:
            raise _no_room(error) from None


class IdIndex:
    """The ids of an input so far, some 40 bytes each; where no row has an id of its own, nothing is kept."""

    def __init__(self) -> None:
        self._unnamed = 0  # up to this row none had an id of its own
        self._named = False
        self._ids = Scratch("CREATE TABLE ids (digest BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID")

    def claim(self, row: int, line: int, given: str | None) -> str:
        """Take the id for this row, or the row's number where `given` is None; "" where it was free, else where it is
        taken: "line 7". Rows come in order."""
        if given is None and not self._named:
            self._unnamed = row
            return ""
        self._named = True
        text = str(row) if given is None else given
        if text.isascii() and text.isdigit() and text[0] != "0" and len(text) < 20 and int(text) <= self._unnamed:
            return f"row {text}, which has no id of its own"
        digest = hashlib.sha256(text.encode()).digest()[:16]
        if self._ids.change("INSERT OR IGNORE INTO ids VALUES (?, ?)", [(digest, line)]):
            return ""
        found = self._ids("SELECT line FROM ids WHERE digest = ?", digest)
        return f"line {found[0]}" if found else ""


class NameIndex:
    """The names of files so far, some 40 bytes each."""

    def __init__(self) -> None:
        self._names = Scratch("CREATE TABLE names (digest BLOB PRIMARY KEY, last INTEGER) WITHOUT ROWID")

    def claim(self, name: str) -> str:
        """The name where it is free, else the first of name-2, name-3 … that is. The same names in the same order come
        out the same."""
        found = self._names("SELECT last FROM names WHERE digest = ?", _digest(name))
        number = found[0] if found else 0
        while True:
            number += 1
            made = f"{name}-{number}" if number > 1 else name
            if self._names.change("INSERT OR IGNORE INTO names VALUES (?, 1)", [(_digest(made),)]):
                self._names("UPDATE names SET last = ? WHERE digest = ?", number, _digest(name))
                return made


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.casefold().encode()).digest()[:16]


def _no_room(error: sqlite3.Error) -> StorageError:
    return StorageError(
        f"the account of the rows cannot be kept in the temporary folder: {printable(str(error))}; make room, or set "
        "TMPDIR to a folder that has it."
    )
