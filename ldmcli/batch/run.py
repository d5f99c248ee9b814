"""One run over a prompt file: its account opened or resumed, rows fed to an engine, outcomes taken in."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

from ldmcli.batch.feed import Stop
from ldmcli.batch.items import BadRow, Item, Outcome
from ldmcli.batch.ledger import Counts, Ledger
from ldmcli.batch.manifest import ManifestWriter
from ldmcli.batch.plan import batches, shard

_INPUT = "input"  # the manifest of rows that no worker ever sees

Engine = Callable[[Iterable[list[Item]], Stop], Iterator[Outcome]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where a run ends before its input does: after so many pictures, or at so many seconds; and which part of the rows
    is this run's, as (number from 1, of how many)."""

    max_images: int | None = None
    seconds: float | None = None
    shard: tuple[int, int] = (1, 1)


class Run:
    """What is drawn of an input into a folder, and the account of it. Use it under the folder's lock. `rows` is how
    many rows of the input are this run's, None where that is not known before the end."""

    def __init__(
        self, folder: Path, ledger: Ledger, limits: Limits, *, rows: int | None = None, retry_failed: bool = False
    ) -> None:
        self.ledger = ledger
        self.rows = rows
        self._folder = folder
        self._limits = limits
        self._retry_failed = retry_failed
        self._deadline = time.monotonic() + limits.seconds if limits.seconds is not None else None

    def draw(
        self, found: Iterable[Item | BadRow], engine: Engine, *, batch_size: int, stop: Stop
    ) -> Generator[Outcome]:
        """Draw what is still wanted of `found`; each outcome comes when it is on the disk and in the ledger."""
        with ManifestWriter(self._folder, _INPUT) as manifest:
            plan = batches(self._wanted(found, manifest), batch_size)
            first = next(plan, None)
            if first is None:
                return  # nothing to draw, nothing to load
            for outcome in engine(itertools.chain([first], plan), stop):
                self.ledger.note(outcome)
                yield outcome
                if self._deadline is not None and time.monotonic() > self._deadline:
                    stop.request()

    def counts(self) -> Counts:
        """The account; without the number of rows as long as that is not known."""
        return self.ledger.counts(self.rows)

    def _wanted(self, found: Iterable[Item | BadRow], manifest: ManifestWriter) -> Iterator[Item]:
        """The pictures to draw, as many as the limits allow; bad rows are noted on the way. An engine reads this in a
        thread of its own."""
        rows = asked = last = 0
        for one in shard(found, self._limits.shard[0] - 1, self._limits.shard[1]):
            if one.row != last:
                rows, last = rows + 1, one.row
            if isinstance(one, BadRow):
                if self.ledger.note_bad(one):
                    manifest.append_bad(one)
            elif self.ledger.wanted(one, retry_failed=self._retry_failed):
                if asked == self._limits.max_images:
                    return
                asked += 1
                yield one
        self.rows = rows
