"""What engines draw from: batches of a plan, read ahead a little, until there are no more or somebody says stop."""

import dataclasses
import queue
import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

from ldmcli.batch.items import Item

_AHEAD = 2
_POLL = 0.1  # s between looks at whether to stop


class Stop:
    """Set when the run is to end after the batches in hand. A plain attribute, which a signal handler may set at any
    instant; an Event's lock might be held by the very thread that the handler interrupts."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Take no more batches."""
        self.requested = True


@dataclasses.dataclass(frozen=True)
class Batch:
    """Items to draw together, and how often that is tried with this time."""

    items: Sequence[Item]
    attempts: int = 1


class Source(Protocol):
    """Where a worker gets its batches."""

    @property
    def over(self) -> bool:
        """Whether there will be no more."""

    def get(self, timeout: float = _POLL) -> Batch | None:
        """The next batch, or None where none came in time or none will."""


class Feed:
    """Batches of a plan, read in a thread of their own: a plan may wait for its input while workers have news.

    What the plan raises, `get` raises after the batches before it. Nothing is read after `close`.
    """

    def __init__(self, batches: Iterable[Sequence[Item]], stop: Stop) -> None:
        self._stop = stop
        self._read: queue.Queue[Batch | BaseException | None] = queue.Queue(_AHEAD)
        self._closed = self._ended = False
        # A daemon: the input may be a terminal at which nobody types any more.
        self._reader = threading.Thread(target=self._fill, args=(batches,), name="plan", daemon=True)
        self._reader.start()

    @property
    def over(self) -> bool:
        """See Source."""
        return self._ended or self._closed or self._stop.requested

    def get(self, timeout: float = _POLL) -> Batch | None:
        """See Source."""
        if self.over:
            return None
        try:
            found = self._read.get(timeout=timeout) if timeout else self._read.get_nowait()
        except queue.Empty:
            return None
        if isinstance(found, Batch):
            return None if self.over else found
        self._ended = True
        if found is not None:
            raise found
        return None

    def close(self) -> None:
        """Read no further. Where the plan does not wait for its input just now, nothing runs in it any more."""
        self._closed = True
        self._reader.join(2 * _POLL)

    def _fill(self, batches: Iterable[Sequence[Item]]) -> None:
        try:
            for items in batches:
                if not self._put(Batch(tuple(items))):
                    return
        except BaseException as error:
            self._put(error)
        else:
            self._put(None)

    def _put(self, found: Batch | BaseException | None) -> bool:
        """Queue `found` as soon as there is room; whether it is still wanted."""
        while not self._closed and not self._stop.requested:
            try:
                self._read.put(found, timeout=_POLL)
            except queue.Full:
                continue
            return True
        return False
