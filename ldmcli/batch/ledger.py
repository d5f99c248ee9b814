"""What of a run is done, as its manifests and pictures on disk tell: who is drawn when it goes on, and the account.

The ledger keeps about twenty bytes a picture, whatever the prompts, and reads pictures' names, never the pictures. A
picture is done when a line of a manifest says so *and* its file is there and not empty.
"""

import array
import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ldmcli.batch.items import BadRow, Item, Outcome
from ldmcli.batch.manifest import DONE, State, key_of, read_manifests, read_states
from ldmcli.batch.pictures import numbers_there
from ldmcli.batch.runfile import read_run
from ldmcli.disk.opening import PICTURES, open_regular
from ldmcli.errors import BadDataError, LdmError, printable

_PER_PAGE = 4096  # pictures or rows
_NOTHING, _IS_DONE, _HAS_FAILED = range(3)  # of a picture
_IS_BAD, _HAS_PICTURES = 1, 2  # of a row

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
    """The state of every picture of a run, by number, and of every bad row. `load` makes one from the disk.

    One thread may ask what is wanted while another notes what came out.
    """

    def __init__(self) -> None:
        self._pages: dict[int, _Page] = {}
        self._rows: dict[int, bytearray] = {}  # pages too: _IS_BAD or _HAS_PICTURES

    @classmethod
    def load(cls, folder: Path) -> "Ledger":
        """The ledger of the run in `folder`, empty for a new one. Logs how many pictures are gone that were done."""
        ledger = cls()
        for state in read_states(folder):
            ledger._take(state)
        # After the manifests: a picture is there before its line, also while another process writes both.
        ledger.verify(folder)
        return ledger

    def verify(self, folder: Path, *, hashes: bool = False) -> int:
        """Make not done whose picture is gone or empty, or, with `hashes`, is not the one that was written: reading
        every picture takes its time. Returns how many, and logs it."""
        sound: dict[int, bytearray] = {}
        for number in _unchanged(folder) if hashes else numbers_there(folder):
            _set_mark(sound, number, 1)
        lost = 0
        for index, page in self._pages.items():
            here = sound.get(index) or bytes(_PER_PAGE)
            missing = [i for i, state in enumerate(page.states) if state == _IS_DONE and not here[i]]
            for place in missing:
                page.states[place] = _NOTHING
            lost += len(missing)
        if lost:
            _log.warning("%d pictures that were done are gone, empty or changed; they count as not done", lost)
        return lost

    def wanted(self, item: Item, *, retry_failed: bool = False) -> bool:
        """Whether `item` is to be drawn: if it is neither done nor failed, or with `retry_failed` only if it failed.

        Raises BadDataError where the row is not the one that was drawn, or failed, under this number.
        """
        page, place = self._place(item.number)
        state = page.states[place]
        if state != _NOTHING and page.keys[place] != int(key_of(item), 16):
            raise BadDataError(
                f"row {item.row} (line {item.line}, id '{printable(item.id)}') is not what it was when its picture was "
                f"drawn; restore the input, or choose another folder."
            )
        page.rows[place], page.pictures[place] = item.row, item.pictures
        _set_mark(self._rows, item.row, _HAS_PICTURES)
        return state == (_HAS_FAILED if retry_failed else _NOTHING)

    def note(self, outcome: Outcome) -> None:
        """Take in how a picture came out. Its line in a manifest comes first."""
        item = outcome.item
        self._set(State(item.row, item.number, outcome.status == DONE, int(key_of(item), 16), item.pictures))

    def note_bad(self, bad: BadRow) -> bool:
        """Take in a row that cannot be drawn; True if that is news, which belongs into a manifest (`append_bad`)."""
        if _mark(self._rows, bad.row) != _NOTHING:
            return False
        _set_mark(self._rows, bad.row, _IS_BAD)
        return True

    def counts(self, rows: int | None) -> Counts:
        """The account, for an input of so many rows."""
        pages = [self._pages[index] for index in sorted(self._pages)]
        images, failed_images = (sum(page.states.count(state) for page in pages) for state in (_IS_DONE, _HAS_FAILED))
        done, failed = _settled_rows(pages)
        failed += sum(page.count(_IS_BAD) for page in list(self._rows.values()))
        pending = None if rows is None else rows - done - failed
        return Counts(rows, done, failed, pending, images, failed_images)

    def _take(self, state: State) -> None:
        """One line of a manifest. Done wins over failed, in whatever order workers' files are read."""
        if state.number is None:
            if _mark(self._rows, state.row) == _NOTHING:
                _set_mark(self._rows, state.row, _IS_BAD)
            return
        page, place = self._place(state.number)
        if state.done or page.states[place] != _IS_DONE:
            self._set(state)

    def _set(self, state: State) -> None:
        assert state.number is not None
        page, place = self._place(state.number)
        page.keys[place], page.rows[place], page.pictures[place] = state.key, state.row, state.pictures
        page.states[place] = _IS_DONE if state.done else _HAS_FAILED
        _set_mark(self._rows, state.row, _HAS_PICTURES)  # also of a row that an older version called bad

    def _place(self, number: int) -> tuple["_Page", int]:
        index, place = divmod(number, _PER_PAGE)
        page = self._pages.get(index)
        if page is None:
            page = self._pages.setdefault(index, _Page())  # at once, as another thread may do the same
        return page, place


class _Page:
    """What is known of so many pictures with numbers in a row, so that a number far off costs only its page."""

    def __init__(self) -> None:
        self.states = bytearray(_PER_PAGE)
        self.keys = array.array("Q", bytes(8 * _PER_PAGE))
        self.rows = array.array("Q", bytes(8 * _PER_PAGE))  # 0 for pictures not heard of
        self.pictures = array.array("I", bytes(4 * _PER_PAGE))  # how many the row has


def _settled_rows(pages: Iterable[_Page]) -> tuple[int, int]:
    """How many rows are done and how many have failed: no picture is open, and some failed. The pictures of a row have
    numbers that follow each other; those not heard of are in no row."""
    done = failed = 0
    current = good = bad = known = wanted = 0
    pictures = (zip(page.rows, page.states, page.pictures, strict=True) for page in pages)
    for row, state, of_row in itertools.chain(*pictures, [(-1, _NOTHING, 0)]):
        if row == 0:
            continue
        if row != current:
            if good + bad == max(known, wanted) > 0:
                done, failed = (done, failed + 1) if bad else (done + 1, failed)
            current, good, bad, known, wanted = row, 0, 0, 0, of_row
        good += state == _IS_DONE
        bad += state == _HAS_FAILED
        known += 1
    return done, failed


def _mark(pages: dict[int, bytearray], number: int) -> int:
    """A byte of many, 0 unless set, kept in pages as pictures are."""
    page = pages.get(number // _PER_PAGE)
    return 0 if page is None else page[number % _PER_PAGE]


def _set_mark(pages: dict[int, bytearray], number: int, value: int) -> None:
    page = pages.get(number // _PER_PAGE)
    if page is None:
        page = pages.setdefault(number // _PER_PAGE, bytearray(_PER_PAGE))
    page[number % _PER_PAGE] = value


def audit(counts: Counts) -> tuple[str, bool]:
    """The account in one sentence, and whether it holds: every row of the input is done or has failed."""
    accounted = counts.done + counts.failed
    sentence = f"{counts.done} done + {counts.failed} failed = {accounted} rows"
    if counts.rows is None:
        return f"{sentence}; how many the input has is not known yet.", False
    if accounted == counts.rows:
        return f"{sentence}, all of the input.", True
    return f"{sentence}, but the input has {counts.rows}.", False


def status(folder: Path) -> dict[str, Any]:
    """How far the run in `folder` is, in JSON values; needs neither lock nor model. Raises MissingInputError where
    there is no run, BadDataError where run.json is damaged."""
    identity = read_run(folder)
    counts = Ledger.load(folder).counts(identity.rows)
    return {"folder": str(folder), **dataclasses.asdict(counts)}


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
