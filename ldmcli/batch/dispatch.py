"""Who draws what next; and after a worker died: what of its batches is done all the same, what is tried again, and what
is given up."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ldmcli.batch.feed import Batch, Feed
from ldmcli.batch.items import Item, Outcome
from ldmcli.batch.manifest import DONE, FAILED, ManifestWriter, key_of, read_manifests
from ldmcli.disk.opening import open_regular
from ldmcli.errors import LdmError, TryAgainError

TRIES = 3  # of a batch whose worker dies; each costs the loading of a model
STARTS = 3  # workers in a row that may die loading
HELD = 2  # batches that a worker has at once: one in hand, one to go on with
_NAME = "engine"  # of the manifest that tells of what no worker lived to tell


class StartError(TryAgainError):
    """Workers cannot be started; what is done stays done."""


class Dispatcher:
    """Hands out the batches of a plan for the run in `folder`, some again. Close it at the end."""

    def __init__(self, folder: Path, feed: Feed) -> None:
        self._folder, self._feed = folder, feed
        self._again: deque[Batch] = deque()
        self._deaths = 0  # in a row, while loading
        self._manifest: ManifestWriter | None = None

    @property
    def over(self) -> bool:
        """Whether all is handed out; what is held may still come back."""
        return self._feed.over and not self._again

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

    def died(self, held: Iterable[Batch]) -> Iterator[Outcome]:
        """Settle what a dead worker held, less what it told of. What it finished without telling, and what is given up,
        is told here; the rest is tried again: all of a batch at first, then each item by itself, so that one that kills
        takes no other with it."""
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
        """Let go of the manifest, if there is one."""
        if self._manifest is not None:
            self._manifest.close()

    def _given_up(self, item: Item, attempts: int) -> Outcome:
        error = f"{attempts} workers died drawing this; it may need more memory than there is."
        outcome = Outcome(item, FAILED, error=error, code=LdmError.exit_code, attempts=attempts, worker=_NAME)
        if self._manifest is None:
            self._manifest = ManifestWriter(self._folder, _NAME)
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
        digest = _sha256(folder / record["path"])
        if digest and digest == record.get("sha256"):
            found[item.number] = Outcome(item, DONE, record["path"], digest, worker=str(record.get("worker", "")))
    return found


def _sha256(picture: Path) -> str:
    if not picture.is_file():
        return ""
    with open_regular(picture) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
