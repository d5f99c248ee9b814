"""One run over a prompt file: rows chosen and put together in batches, fed to an engine, outcomes taken in."""

import itertools
import operator
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

from ldmcli.batch.dispatch import Stop
from ldmcli.batch.fields import OWN, REQUEST_FIELDS
from ldmcli.batch.items import BadRow, Item, Outcome
from ldmcli.batch.ledger import Counts, Ledger
from ldmcli.batch.manifest import ManifestWriter
from ldmcli.conditions import CONDITION_FIELDS
from ldmcli.spec import PICTURES

_WINDOW = 1024  # pictures that come while one waits
_INPUT = "input"  # the manifest of rows that no worker ever sees

Engine = Callable[..., Iterator[Outcome]]  # of the batches, and stop=
_OF_EACH = (*OWN, *PICTURES, *CONDITION_FIELDS, "embedding_row")  # what pictures that are drawn together may differ in
_settings = operator.attrgetter(*(f"request.{name}" for name in REQUEST_FIELDS if name not in _OF_EACH))


class Run:
    """What is drawn of an input into a folder, and the account of it. Use it under the folder's lock.

    `rows` is how many rows the input has, None where that is not known before the end. The run may end before its
    input does: after `max_images` pictures, or at `seconds`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rows: int | None = None,
        max_images: int | None = None,
        seconds: float | None = None,
        retry_failed: bool = False,
    ) -> None:
        self.rows = rows
        self._folder, self._ledger = folder, Ledger(folder)
        self._max_images, self._retry_failed = max_images, retry_failed
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def draw(
        self, found: Iterable[Item | BadRow], engine: Engine, *, batch_size: int, stop: Stop
    ) -> Generator[Outcome]:
        """Draw what is still wanted of `found`; each outcome comes when it is on the disk and in the ledger."""
        with ManifestWriter(self._folder, _INPUT) as manifest:
            plan = batches(self._wanted(found, manifest), batch_size)
            if self.rows is not None:  # an input that is still being written has no rows to wait for
                plan = by_loras(plan)
            first = next(plan, None)
            if first is None:
                return  # nothing to draw, nothing to load
            for outcome in engine(itertools.chain([first], plan), stop=stop):
                self._ledger.note(outcome)
                yield outcome
                if self._deadline is not None and time.monotonic() > self._deadline:
                    stop.request()

    def counts(self) -> Counts:
        """The account; without the number of rows as long as that is not known."""
        return self._ledger.counts(self.rows)

    def _wanted(self, found: Iterable[Item | BadRow], manifest: ManifestWriter) -> Iterator[Item]:
        """The pictures to draw, as many as the limits allow; bad rows are noted on the way. An engine reads this in a
        thread of its own."""
        rows = asked = last = 0
        for one in found:
            if one.row != last:
                rows, last = rows + 1, one.row
            if isinstance(one, BadRow):
                if self._ledger.note_bad(one):
                    manifest.append_bad(one)
            elif self._ledger.wanted(one, retry_failed=self._retry_failed):
                if asked == self._max_images:
                    return
                asked += 1
                yield one
        self.rows = rows


def batches(items: Iterable[Item], size: int, *, window: int = _WINDOW) -> Iterator[list[Item]]:
    """Batches of at most `size` pictures whose requests differ in texts, seed and pictures alone.

    A batch goes out as soon as it is full, so an input that waits for its user still flows; and it goes out unfilled
    once `window` pictures have come since its first. So at most `window` are held back, and the order is the same
    every time: it depends on the items alone.
    """
    waiting: dict[tuple[object, ...], tuple[int, list[Item]]] = {}  # with the arrival of the first, which is the oldest
    for arrival, item in enumerate(items):
        settings = _settings(item)
        _, batch = waiting.setdefault(settings, (arrival, []))
        batch.append(item)
        if len(batch) == size:
            yield waiting.pop(settings)[1]
        if waiting:
            oldest, (first, batch) = next(iter(waiting.items()))
            if arrival - first >= window - 1:
                del waiting[oldest]
                yield batch
    yield from (batch for _, batch in waiting.values())


def by_loras(found: Iterable[list[Item]], *, window: int = _WINDOW) -> Iterator[list[Item]]:
    """The batches, those with the same LoRAs behind one another: merging others into the weights takes up to a second.

    A batch whose LoRAs are those of the one before goes out at once. Others wait until `window` pictures have come
    since the first of them, or none are left; so where all have the same, nothing is held back.
    """
    waiting: dict[tuple[object, ...], tuple[int, list[list[Item]]]] = {}  # the oldest first, with what had come before
    merged: tuple[object, ...] | None = None
    came = 0
    for batch in found:
        loras = tuple(lora.what for lora in batch[0].request.loras)
        if merged in (None, loras):
            merged = loras
            yield batch
        else:
            waiting.setdefault(loras, (came, []))[1].append(batch)
        came += len(batch)
        oldest = next(iter(waiting), None)
        if oldest is not None and came - waiting[oldest][0] >= window:
            merged = oldest
            yield from waiting.pop(oldest)[1]
    for _, held in waiting.values():
        yield from held
