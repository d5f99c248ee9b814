"""A run as another process sees it, by its run.json and its manifests alone: nothing is locked, and nothing written."""

import dataclasses
import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldmcli.batch.ledger import Counts, Ledger
from ldmcli.batch.manifest import FAILED, ManifestTail
from ldmcli.batch.pace import Pace
from ldmcli.batch.runfile import read_run
from ldmcli.disk.lock import held_by


@dataclasses.dataclass(frozen=True)
class View:
    """How far a run is. `over`: no process draws it now, as far as that can be told. `failures` are the manifest's
    lines on what has failed since the view before."""

    counts: Counts
    over: bool
    per_second: float
    seconds_left: float | None
    failures: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the failures."""
        left = None if self.seconds_left is None else round(self.seconds_left, 1)
        pace = {"per_second": round(self.per_second, 3), "seconds_left": left}
        return {**dataclasses.asdict(self.counts), "running": not self.over, **pace}


class Watch:
    """Looks at the run in `folder` again and again. Raises MissingInputError where there is none, BadDataError where
    run.json is damaged."""

    def __init__(self, folder: Path) -> None:
        read_run(folder)
        self._folder = folder
        self._tail = ManifestTail(folder)  # before the ledger: what comes meanwhile is read twice, and never lost
        self._ledger = Ledger(folder)
        self._began = (held := held_by(folder)) and _seconds(held.since)
        self._pace: Pace | None = None

    def view(self) -> View:
        """How far the run is now."""
        held = held_by(self._folder)  # before its lines: the last ones come before it lets go
        known = self._pace is not None
        failures = []
        for record in self._new_lines():
            if known and record["status"] == FAILED:
                failures.append(record)
        counts = self._ledger.counts(read_run(self._folder).rows)
        over = held is None or (counts.pending == 0 and not held.here)
        rate, left = 0.0, None
        if self._pace is not None and not over:
            now = time.time()
            rate, left = self._pace.per_second(now), self._pace.seconds_left(_pictures_left(counts), now)
        return View(counts, over, rate, left if counts.pending is not None else None, tuple(failures))

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        """The lines that were added, each taken in. At first those of before, which tell the pace."""
        began = self._began or 0.0
        found = [(record, _seconds(record.get("time"))) for record in self._tail.read()]
        self._pace = self._pace or Pace(began or min((at for _, at in found if at), default=time.time()))
        for record, at in sorted(found, key=lambda one: one[1]):
            self._ledger.note_line(record)
            if record["number"] is not None and at >= began:
                self._pace.note(at)
            yield record


def _pictures_left(counts: Counts) -> float:
    """How many pictures the rows that are to be drawn have, if they have as many as others."""
    settled = counts.done + counts.failed
    return (counts.pending or 0) * ((counts.images + counts.failed_images) / settled if settled else 1.0)


def _seconds(text: Any) -> float:
    """A time as the manifest and the lock have it, in seconds; 0 where it is none."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0
