"""Whether a row's id was there before, for any number of rows."""

import hashlib

from ldmcli.batch.scratch import Scratch


class IdIndex:
    """The ids of an input so far, some 40 bytes each on disk; where no row has an id of its own, nothing is kept."""

    def __init__(self) -> None:
        self._unnamed = 0  # up to this row none had an id of its own
        self._named = False
        self._ids = Scratch("CREATE TABLE ids (digest BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID")

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
        if self._ids.change("INSERT OR IGNORE INTO ids VALUES (?, ?)", [(digest, line)]):
            return ""
        found = self._ids("SELECT line FROM ids WHERE digest = ?", digest)
        assert found is not None
        return f"line {found[0]}"
