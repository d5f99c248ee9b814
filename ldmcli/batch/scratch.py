"""A database for as long as a run lasts: on disk in a temporary file without a name, so that rows cost no memory."""

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

    def close(self) -> None:
        """Forget everything."""
        self._store.close()


def _no_room(error: sqlite3.Error) -> StorageError:
    return StorageError(
        f"the account of the rows cannot be kept in the temporary folder: {printable(str(error))}; make room, or set "
        "TMPDIR to a folder that has it."
    )
