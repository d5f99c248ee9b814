"""Which worker draws what next: batches of a plan, read a little ahead; and after a worker died, what of its batches is
done all the same, what is tried again, and what is given up."""

import dataclasses
import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ldmcli.batch.items import Item, Outcome
from ldmcli.batch.manifest import DONE, FAILED, ManifestWriter, key_of, read_manifests
from ldmcli.disk.hashes import FileHashes
from ldmcli.errors import LdmError, TryAgainError

TRIES = 3  # of a batch whose worker dies; each costs the loading of a model
STARTS = 3  # workers in a row that may die loading
HELD = 2  # batches that a worker has at once: one in hand, one to go on with
POLL = 0.1  # s between looks at the plan and at whether to stop
_NAME = "engine"  # of the manifest for what killed its workers


class StartError(TryAgainError):
    """Workers cannot be started; what is done stays done."""


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


class Feed:
    """Batches read in a thread of their own, a little ahead: a plan may wait for its input while workers have news.

    What the plan raises, `get` raises after the batches before it. Nothing is read after `close`.
    """

    def __init__(self, batches: Iterable[Batch], stop: Stop) -> None:
        self._stop = stop
        self._read: queue.Queue[Batch | BaseException | None] = queue.Queue(HELD)
        self._closed = False
        # A daemon: the input may be a terminal at which nobody types any more.
        self._reader = threading.Thread(target=self._fill, args=(batches,), name="plan", daemon=True)
        self._reader.start()

    @property
    def over(self) -> bool:
        """Whether there will be no more."""
        return self._closed or self._stop.requested

    def get(self, timeout: float = POLL) -> Batch | None:
        """The next batch, or None where none came in time or none will."""
        if self.over:
            return None
        try:
            found = self._read.get(timeout > 0, timeout)
        except queue.Empty:
            return None
        if isinstance(found, Batch):
            return None if self.over else found
        self._closed = True
        if found is not None:
            raise found
        return None

    def close(self) -> None:
        """Read no further. Where the plan does not wait for its input just now, nothing runs in it any more."""
        self._closed = True
        self._reader.join(2 * POLL)

    def _fill(self, batches: Iterable[Batch]) -> None:
        try:
            for batch in batches:
                if not self._put(batch):
                    return
        except BaseException as error:
            self._put(error)
        else:
            self._put(None)

    def _put(self, found: Batch | BaseException | None) -> bool:
        """Queue `found` as soon as there is room; whether it is still wanted."""
        while not self.over:
            try:
                self._read.put(found, timeout=POLL)
            except queue.Full:
                continue
            return True
        return False


class RemoteWorker(ABC):
    """A worker in another process, as whoever hands out batches sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready = self.finishing = False
        self.held: list[Batch] = []  # less what is done

    @abstractmethod
    def give(self, batch: Batch) -> None:
        """Let it draw a batch after those that it holds."""

    @abstractmethod
    def finish(self) -> None:
        """Let it end after the batch in hand, and draw no more; twice does no harm."""


class Dispatcher:
    """Hands out the batches of a plan for the run in `folder`, some again. Close it at the end."""

    def __init__(self, folder: Path, batches: Iterable[Sequence[Item]], stop: Stop) -> None:
        self.failure: BaseException | None = None  # what ends the run
        self._folder, self._stop = folder, stop
        self._feed = Feed(map(Batch, batches), stop)
        self._again: deque[Batch] = deque()
        self._deaths = 0  # in a row, while loading
        self._said: dict[str, str] = {}  # which worker said it first
        self._manifest: ManifestWriter | None = None

    @property
    def ending(self) -> bool:
        """Whether the run is to end before its plan does."""
        return self.failure is not None or self._stop.requested

    def hand_out(self, workers: Sequence[RemoteWorker]) -> None:
        """Give each worker what it may hold; all of them finish when nothing is left, in the plan or in hand."""
        try:
            for worker in workers:
                while not self.ending and worker.ready and (batch := self.next(worker.held)):
                    worker.give(batch)
        except Exception as error:  # of the plan
            self.failure = error
        if self.ending or (self._feed.over and not self._again and not any(worker.held for worker in workers)):
            for worker in workers:
                worker.finish()

    def next(self, held: Sequence[Batch]) -> Batch | None:
        """A batch for a worker that holds these, if it is to get one and there is one. Raises what the plan raises.

        One that a worker died over goes to a worker that has nothing else, since that would be suspected as well.
        """
        if self._again:
            return None if held else self._again.popleft()
        if len(held) >= HELD or any(batch.attempts > 1 for batch in held):
            return None
        return self._feed.get(timeout=0)

    def started(self, *, lived: bool) -> None:
        """Take note that a worker is ready, or died before. Raises StartError where too many did in a row."""
        self._deaths = 0 if lived else self._deaths + 1
        if self._deaths > STARTS:
            raise StartError(f"{self._deaths} workers in a row died loading the model; is there memory for it?")

    def is_news(self, text: str, worker: str) -> bool:
        """Whether no other worker has said so before: what is wrong with a LoRA, all find out for themselves."""
        return self._said.setdefault(text, worker) == worker

    def died(self, held: Iterable[Batch]) -> Iterator[Outcome]:
        """Settle what a dead worker held. Outcomes are what it finished all the same, and what is given up; the rest is
        tried again: all of a batch at first, then each item by itself, so that one that kills takes no other with
        it."""
        held = list(held)
        found = noted(self._folder, (item for batch in held for item in batch.items))
        yield from found.values()
        for batch in held:
            left = tuple(item for item in batch.items if item.number not in found)
            if batch.attempts >= TRIES:
                yield from (self._given_up(item, batch.attempts) for item in left)
            elif batch.attempts == TRIES - 1:
                self._again.extend(Batch((item,), TRIES) for item in left)
            elif left:
                self._again.append(Batch(left, batch.attempts + 1))

    def close(self) -> None:
        """Read no further, and let go of the manifest, if there is one."""
        self._feed.close()
        if self._manifest is not None:
            self._manifest.close()

    def _given_up(self, item: Item, attempts: int) -> Outcome:
        error = f"{attempts} workers died drawing this; it may need more memory than there is."
        outcome = Outcome(item, FAILED, error=error, code=LdmError.exit_code, attempts=attempts, worker=_NAME)
        self._manifest = self._manifest or ManifestWriter(self._folder, _NAME)
        self._manifest.append(outcome)
        return outcome


def noted(folder: Path, items: Iterable[Item]) -> dict[int, Outcome]:
    """Those of `items`, by number, whose pictures are whole on the disk and noted in a manifest."""
    wanted = {item.number: item for item in items}
    found: dict[int, Outcome] = {}
    for record in read_manifests(folder) if wanted else ():
        item = wanted.get(record["number"])
        if item is None or record["status"] != DONE or record["key"] != key_of(item):
            continue
        # A line may be older than this run, and its picture lost since.
        picture = folder / record["path"]
        digest = FileHashes().sha256(picture) if picture.is_file() else ""
        if digest and digest == record.get("sha256"):
            found[item.number] = Outcome(item, DONE, record["path"], digest, worker=str(record.get("worker", "")))
    return found
