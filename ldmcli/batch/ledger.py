"""What of a run is done, as its manifests and pictures on disk tell: who is drawn when it goes on, and the account.

A picture is done when a line of a manifest says so *and* its file is there and not empty; pictures' names are read,
never the pictures.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldmcli.batch.fields import PROMPT
from ldmcli.batch.items import BadRow, Item, Outcome
from ldmcli.batch.manifest import DONE, FAILED, State, key_of, read_manifests, read_states
from ldmcli.batch.pictures import numbers_there
from ldmcli.batch.runfile import read_run
from ldmcli.batch.scratch import Scratch
from ldmcli.disk.opening import PICTURES, open_regular
from ldmcli.errors import BadDataError, LdmError, printable

_DONE, _FAILED, _BAD = 1, 0, -1
_TABLES = (
    # A bad row stands there as a picture whose number is the row's, negative.
    "CREATE TABLE pictures (number INTEGER PRIMARY KEY, row INTEGER, state INTEGER, pictures INTEGER, key TEXT)",
    "CREATE INDEX by_row ON pictures (row)",
    "CREATE TABLE sound (number INTEGER PRIMARY KEY)",
)
_SET = (
    "INSERT INTO pictures VALUES (?, ?, ?, ?, ?) ON CONFLICT (number) DO UPDATE SET row = excluded.row, "
    "state = excluded.state, pictures = excluded.pictures, key = excluded.key WHERE excluded.state >= pictures.state"
)
# A row is settled when all its pictures are done or have failed.
_COUNT = """
    SELECT total(done), total(failed), total(drawn AND done >= pictures),
        total(NOT drawn OR (done < pictures AND done + failed >= pictures))
    FROM (
        SELECT sum(state = 1) AS done, sum(state = 0) AS failed, max(pictures) AS pictures, max(number) >= 0 AS drawn
        FROM pictures GROUP BY row
    )
"""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Counts:
    """The account of a run. `done`, `failed` and `pending` count rows: done means all pictures of the row, pending
    that some is neither done nor failed. `rows` and `pending` are None where the input does not say how long it is."""

    rows: int | None
    done: int
    failed: int
    pending: int | None
    images: int  # pictures done
    failed_images: int


class Ledger:
    """The pictures of a run that are done or have failed, and its bad rows. `load` makes one from the disk.

    One thread may ask what is wanted while another notes what came out.
    """

    def __init__(self) -> None:
        self._database = Scratch(*_TABLES)
        self._has_bad = False

    @classmethod
    def load(cls, folder: Path) -> "Ledger":
        """The ledger of the run in `folder`, empty for a new one. Logs how many pictures are gone that were done."""
        ledger = cls()
        ledger._database.change(_SET, map(_as_picture, read_states(folder)))
        ledger._has_bad = ledger._database("SELECT 1 FROM pictures WHERE number < 0") is not None
        # After the manifests: a picture is there before its line, also while another process writes both.
        ledger.verify(folder)
        return ledger

    def verify(self, folder: Path, *, hashes: bool = False) -> int:
        """Make not done whose picture is gone or empty, or, with `hashes`, is not the one that was written: reading
        every picture takes its time. Returns how many, and logs it."""
        sound = _unchanged(folder) if hashes else numbers_there(folder)
        self._database("DELETE FROM sound")
        self._database.change("INSERT OR IGNORE INTO sound VALUES (?)", ((number,) for number in sound))
        lost = self._database.change(
            "DELETE FROM pictures WHERE state = ? AND number NOT IN (SELECT number FROM sound)", [(_DONE,)]
        )
        self._database("DELETE FROM sound")
        if lost:
            _log.warning("%d pictures that were done are gone, empty or changed; they count as not done", lost)
        return lost

    def wanted(self, item: Item, *, retry_failed: bool = False) -> bool:
        """Whether `item` is to be drawn: if it is neither done nor failed, or with `retry_failed` only if it failed.

        Raises BadDataError where the row is not the one that was drawn, or failed, under this number.
        """
        found = self._database("SELECT state, key FROM pictures WHERE number = ?", item.number)
        if found and found[1] != key_of(item):
            raise BadDataError(
                f"row {item.row} (line {item.line}, id '{printable(item.id)}') is not what it was when its picture was "
                f"drawn; restore the input, or choose another folder."
            )
        if self._has_bad:
            self._database("DELETE FROM pictures WHERE number = ?", -item.row)  # an older version called it bad
        return retry_failed and found[0] == _FAILED if found else not retry_failed

    def note(self, outcome: Outcome) -> None:
        """Take in how a picture came out. Its line in a manifest comes first."""
        item = outcome.item
        self._database(_SET, item.number, item.row, outcome.status == DONE, item.pictures, key_of(item))

    def note_bad(self, bad: BadRow) -> bool:
        """Take in a row that cannot be drawn; True if that is news, which belongs into a manifest (`append_bad`)."""
        if self._database("SELECT 1 FROM pictures WHERE row = ?", bad.row):
            return False
        self._has_bad = True
        self._database(_SET, -bad.row, bad.row, _BAD, 0, "")
        return True

    def has_failed(self, row: int, number: int) -> bool:
        """Whether picture `number` has failed, or where it is negative, the row is bad."""
        found = self._database("SELECT state, (SELECT max(number) FROM pictures WHERE row = ?) FROM pictures "
                               "WHERE number = ?", row, number)  # fmt: skip
        return found is not None and (found[0] == _FAILED or (found[0] == _BAD and found[1] < 0))

    def counts(self, rows: int | None) -> Counts:
        """The account, for an input of so many rows."""
        counted = self._database(_COUNT)
        assert counted is not None
        images, failed_images, done, failed = map(int, counted)
        return Counts(rows, done, failed, None if rows is None else rows - done - failed, images, failed_images)


def _as_picture(state: State) -> tuple[int, int, int, int, str]:
    if state.number is None:
        return -state.row, state.row, _BAD, 0, ""
    return state.number, state.row, _DONE if state.done else _FAILED, state.pictures, state.key


def audit(counts: Counts) -> tuple[str, bool]:
    """The account in one sentence, and whether it holds: every row of the input is done or has failed."""
    accounted = counts.done + counts.failed
    sentence = f"{counts.done} done + {counts.failed} failed = {accounted} rows"
    if counts.rows is None:
        return f"{sentence}; how many the input has is not known yet.", False
    if accounted == counts.rows:
        return f"{sentence}, all of the input.", True
    if accounted < counts.rows:
        rest = counts.rows - accounted
        return f"{counts.done} done + {counts.failed} failed + {rest} to be drawn = {counts.rows} rows.", False
    return f"{sentence}, but the input has {counts.rows}.", False


def status(folder: Path) -> dict[str, Any]:
    """How far the run in `folder` is, in JSON values; needs neither lock nor model. Raises MissingInputError where
    there is no run, BadDataError where run.json is damaged."""
    identity = read_run(folder)
    counts = Ledger.load(folder).counts(identity.rows)
    return {"folder": str(folder), **dataclasses.asdict(counts)}


def failures(folder: Path) -> Iterator[dict[str, Any]]:
    """What has failed in the run in `folder`, in the order of its rows: row, line, id, seed (None for a bad row),
    prompt, error and code, in JSON values. Raises as `status` does."""
    read_run(folder)
    ledger = Ledger.load(folder)
    last = {_as_number(record): record for record in read_manifests(folder) if record["status"] == FAILED}
    for number, record in sorted(last.items(), key=lambda one: (one[1]["row"], one[0])):
        if ledger.has_failed(record["row"], number):
            request = record.get("request")
            facts = {name: record.get(name) for name in ("row", "line", "id", "seed", "error", "code")}
            yield facts | {"prompt": request.get(PROMPT) if isinstance(request, dict) else None}


def _as_number(record: Mapping[str, Any]) -> int:
    return -record["row"] if record["number"] is None else record["number"]


def _unchanged(folder: Path) -> Iterator[int]:
    """The numbers of the pictures whose file has the hash that a manifest tells. One that was drawn twice has two."""
    for record in read_manifests(folder):
        if record["status"] != DONE:
            continue
        try:
            with open_regular(folder / record["path"], PICTURES) as file:
                digest = hashlib.file_digest(file, "sha256")
        except LdmError:
            continue
        if digest.hexdigest() == record.get("sha256"):
            yield record["number"]
