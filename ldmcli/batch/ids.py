"""Whether a row's id was there before, for any number of rows."""

import hashlib
import sqlite3
from typing import Any

from ldmcli.errors import StorageError, printable


class IdIndex:
    """The ids of an input so far. They are kept on disk, in a temporary file without a name, some 40 bytes each; where
    no row has an id of its own, nothing is."""

    def __init__(self) -> None:
        self._unnamed = 0  # up to this row none had an id of its own
        self._named = False
        self._store = sqlite3.connect(
            "",  # on disk, gone when closed
            isolation_level=None,
            check_same_thread=False,  # rows may be read on in another thread, never in two at once
        )
        for command in (
            "PRAGMA journal_mode=OFF",
            "PRAGMA cache_size=-8192",
            "CREATE TABLE ids (digest BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID",
            "BEGIN",
        ):
            self._store.execute(command)
        self._cursor = self._store.cursor()

    def claim(self, row: int, line: int, given: str | None) -> str:
        """Take the id for this row, or the row's number where `given` is None; "" where it was free, else where it is
        taken: "line 7". Rows come in order. Raises StorageError where there is no room for it."""
        if given is None and not self._named:
            self._unnamed = row
            return ""
        self._named = True
        text = str(row) if given is None else given
        if text.isascii() and text.isdigit() and text[0] != "0" and len(text) < 20 and int(text) <= self._unnamed:
            return f"row {text}, which has no id of its own"
        digest = hashlib.sha256(text.encode()).digest()[:16]
        if self._execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (digest, line)).rowcount:
            return ""
        return f"line {self._execute('SELECT line FROM ids WHERE digest = ?', (digest,)).fetchone()[0]}"

    def close(self) -> None:
        """Forget everything."""
        self._store.close()

    def _execute(self, command: str, values: tuple[Any, ...]) -> sqlite3.Cursor:
        try:
            return self._cursor.execute(command, values)
        except sqlite3.Error as error:
            raise StorageError(
                f"the list of ids cannot be kept in the temporary folder: {printable(str(error))}; make room, or set "
                "TMPDIR to a folder that has it."
            ) from None
