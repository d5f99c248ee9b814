"""What of a run is done, by its manifests and pictures on disk: who is drawn when it goes on, and the account.

A picture is done when a line of a manifest says so *and* its file is there and not empty; pictures' names are read,
never the pictures.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldmcli.batch.fields import PROMPT
from ldmcli.batch.items import BadRow, Item, Outcome
from ldmcli.batch.manifest import DONE, FAILED, STATES, bad_state, key_of, read_manifests, read_states, state_of
from ldmcli.batch.pictures import is_there, numbers_there, picture_path
from ldmcli.batch.runfile import read_run
from ldmcli.batch.scratch import Scratch
from ldmcli.errors import BadDataError, LdmError, printable

_TABLES = (
    # The states are 1 done, 0 failed, -1 a row that cannot be drawn.
    "CREATE TABLE pictures (number INTEGER PRIMARY KEY, row INTEGER, state INTEGER, pictures INTEGER, key TEXT)",
    "CREATE TABLE there (number INTEGER PRIMARY KEY)",
    "CREATE TABLE named (path TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID",
)
_INDEX = "CREATE INDEX by_row ON pictures (row)"
_SET = (
    "INSERT INTO pictures VALUES (?, ?, ?, ?, ?) ON CONFLICT (number) DO UPDATE SET row = excluded.row, "
    "state = excluded.state, pictures = excluded.pictures, key = excluded.key WHERE excluded.state >= pictures.state"
)
_DROP_LOST = "DELETE FROM pictures WHERE state = 1 AND number NOT IN (SELECT number FROM there)"
# A row that an older version called bad and that was drawn since.
_DROP_MENDED = "DELETE FROM pictures WHERE number < 0 AND row IN (SELECT row FROM pictures WHERE number >= 0)"
# A row is settled when all its pictures are done or have failed; a bad row counts as one that failed.
_COUNT = """
    SELECT total(done), total(failed), total(done >= pictures), total(done < pictures AND settled >= pictures)
    FROM (
        SELECT sum(state = 1) AS done, sum(state = 0) AS failed, count(*) AS settled, max(pictures) AS pictures
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
    """The pictures of the run in `folder` that are done or have failed, and its bad rows. Logs how many pictures are
    gone that were done. One thread may ask what is wanted while another notes what came out."""

    def __init__(self, folder: Path) -> None:
        self._database = Scratch(*_TABLES)
        self._database.change(_SET, read_states(folder))
        # After the manifests: a picture is there before its line, also while another process writes both.
        self._named = _is_named(folder)
        if self._named:
            self._database.change("INSERT OR IGNORE INTO named VALUES (?, ?)", _named_there(folder))
            self._database("INSERT OR IGNORE INTO there SELECT number FROM named")
        else:
            self._database.change("INSERT OR IGNORE INTO there VALUES (?)", zip(numbers_there(folder), strict=True))
        if lost := self._database.change(_DROP_LOST, [()]):
            _log.warning("%d pictures that were done are gone or empty; they count as not done", lost)
        for command in ("DROP TABLE there", _DROP_MENDED, _INDEX):  # the index costs least when all is there
            self._database(command)
        self._has_bad = self._database("SELECT 1 FROM pictures WHERE number < 0") is not None

    def wanted(self, item: Item, *, retry_failed: bool = False) -> bool:
        """Whether `item` is to be drawn: if it is neither done nor failed, or with `retry_failed` only if it failed.

        Raises BadDataError where the row is not the one that was drawn, or failed, under this number, or another
        picture has its name.
        """
        found = self._database("SELECT state, key FROM pictures WHERE number = ?", item.number)
        if found and found[1] != key_of(item):
            raise BadDataError(
                f"row {item.row} (line {item.line}, id {printable(repr(item.id))}) is not what it was when its picture "
                f"was drawn; restore the input, or choose another folder."
            )
        if self._named and not found:
            other = self._database("SELECT number FROM named WHERE path = ?", picture_path(item, "").lower())
            if other and other[0] != item.number:
                raise BadDataError(
                    f"row {item.row} (line {item.line}) would be drawn over another picture of the run, "
                    f"{printable(repr(item.name))}; put {{number}} into --name and choose another folder."
                )
        if self._has_bad:
            self._database("DELETE FROM pictures WHERE number = ?", -item.row)  # an older version called it bad
        return retry_failed and found[0] == STATES[FAILED] if found else not retry_failed

    def note(self, outcome: Outcome) -> None:
        """Take in how a picture came out. Its line in a manifest comes first."""
        item = outcome.item
        self._database(_SET, item.number, item.row, STATES[outcome.status], item.pictures, key_of(item))

    def note_bad(self, bad: BadRow) -> bool:
        """Take in a row that cannot be drawn; True if that is news, which belongs into a manifest (`append_bad`)."""
        if self._database("SELECT 1 FROM pictures WHERE row = ?", bad.row):
            return False
        self._has_bad = True
        self._database(_SET, *bad_state(bad.row))
        return True

    def note_line(self, record: dict[str, Any]) -> None:
        """Take in a line of a manifest."""
        self._database(_SET, *state_of(record))

    def has_failed(self, number: int) -> bool:
        """Whether a picture has failed or, where the number is negative, the row is bad."""
        return self._database("SELECT 1 FROM pictures WHERE number = ? AND state < 1", number) is not None

    def counts(self, rows: int | None) -> Counts:
        """The account, for an input of so many rows."""
        images, failed_images, done, failed = map(int, self._database(_COUNT) or ())
        return Counts(rows, done, failed, None if rows is None else rows - done - failed, images, failed_images)


def _named_there(folder: Path) -> Iterator[tuple[str, int]]:
    """The pictures whose files are there by the names that the manifests have: path without ending, and number."""
    for record in read_manifests(folder):
        if record["status"] == DONE and is_there(folder, record["path"]):
            yield os.path.splitext(record["path"])[0].lower(), record["number"]


def _is_named(folder: Path) -> bool:
    """Whether a pattern names the pictures of the run in `folder`."""
    try:
        return "name" in read_run(folder).settings
    except LdmError:
        return False


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
    return {"folder": str(folder), **dataclasses.asdict(Ledger(folder).counts(identity.rows))}


def failures(folder: Path) -> Iterator[dict[str, Any]]:
    """What has failed in the run in `folder`, in the order of its rows: row, line, id, seed (None for a bad row),
    prompt, error and code, in JSON values. Raises as `status` does."""
    read_run(folder)
    ledger = Ledger(folder)
    failed = (record for record in read_manifests(folder) if record["status"] == FAILED)
    last = {-record["row"] if record["number"] is None else record["number"]: record for record in failed}
    for number, record in sorted(last.items(), key=lambda one: (one[1]["row"], one[0])):
        if ledger.has_failed(number):
            request = record.get("request")
            facts = {name: record.get(name) for name in ("row", "line", "id", "seed", "error", "code")}
            yield facts | {"prompt": request.get(PROMPT) if isinstance(request, dict) else None}
