"""What draws the batches of a run on one device, writes the pictures and notes them in its manifest."""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from ldmcli.batch.dispatch import Feed
from ldmcli.batch.items import Item, Outcome, Setup
from ldmcli.batch.manifest import DONE, FAILED, ManifestWriter
from ldmcli.batch.pictures import picture_path, write_picture
from ldmcli.errors import BadDataError, LdmError, TryAgainError, printable
from ldmcli.fitting import FittedRequest
from ldmcli.session import Session
from ldmcli.session.picture import Picture

if TYPE_CHECKING:
    from ldmcli.serving.client import RemoteSession

    OpenSession = Callable[[Setup], Session | RemoteSession]

_WRITERS = 4  # threads that encode and write; each waits for the disk most of the time


class Worker:
    """A session with its own manifest. Its pictures are encoded and written in threads beside the next batch.

    Raises LdmError where the model cannot be loaded or the manifest not be written.
    """

    def __init__(self, setup: Setup, name: str, session: "Session | RemoteSession | None" = None) -> None:
        """`session` draws in place of one of the worker's own."""
        self.name = name
        self._setup = setup
        self._session = session or Session(setup.model, setup.runtime)
        self._session.load()
        if setup.metadata:  # pictures without a record need no hash
            self._session.begin_hashing()
        self._manifest = ManifestWriter(setup.folder, name)
        self._writing = threading.Lock()  # a manifest has one writer at a time
        self._threads = ThreadPoolExecutor(_WRITERS, "png")

    def submit(self, items: Sequence[Item], attempts: int = 1) -> "list[Future[Outcome]]":
        """Draw a batch: a future for each item, which has how it came out once that is on the disk.

        What the futures raise, a full disk say, ends the run; so does DeviceLostError.
        """
        fitted, futures = [], {}
        for item in items:
            try:
                fitted.append((item, self._fitted(item)))
            except LdmError as error:
                failed = Outcome(item, FAILED, error=str(error), code=error.exit_code)
                futures[item.number] = self._threads.submit(self._noted, failed, attempts)
        pictures = self._session.draw((request for _, request in fitted), batch_size=max(1, len(items)))
        for (item, _), picture in zip(fitted, pictures, strict=True):
            futures[item.number] = self._threads.submit(self._commit, item, picture, attempts)
        return [futures[item.number] for item in items]

    def _fitted(self, item: Item) -> FittedRequest:
        """The item's request, which did fit when its row was checked. Raises LdmError where a LoRA is gone since, or
        another one."""
        fitted = self._session.fit(item.request)
        for before, now in zip(item.request.loras, fitted.loras, strict=False):
            if before.sha256 not in ("", now.sha256):
                raise BadDataError(f"the LoRA {printable(now.name)} has changed since the row was checked; run again.")
        return fitted

    def run(self, batches: Feed) -> Iterator[Outcome]:
        """Draw batches as they come until there are no more, each while the pictures of the one before are written.

        Raises what ends the run, after all that could still be noted.
        """
        writing: list[Future[Outcome]] = []
        try:
            while not batches.over:
                batch = batches.get()
                drawn = self.submit(batch.items, batch.attempts) if batch else []
                # Reported while a device is at work on what came after: whoever hands out batches waits for that.
                before, writing = writing, drawn
                yield from results(before)
        except Exception:
            yield from (future.result() for future in writing if future.exception() is None)
            raise
        yield from results(writing)

    def close(self) -> None:
        """Wait for what is being written, and let go of model and manifest."""
        try:
            self._threads.shutdown()
        except KeyboardInterrupt:
            self._threads.shutdown(cancel_futures=True)  # what is half written is finished
            raise
        self._session.close()
        self._manifest.close()

    def _commit(self, item: Item, picture: Picture, attempts: int) -> Outcome:
        """Write a picture and then its line."""
        return self._noted(self._written(item, picture), attempts, picture.seconds)

    def _noted(self, outcome: Outcome, attempts: int, seconds: float = 0.0) -> Outcome:
        outcome = dataclasses.replace(outcome, attempts=attempts, worker=self.name, seconds=seconds)
        with self._writing:
            self._manifest.append(outcome)
        return outcome

    def _written(self, item: Item, picture: Picture) -> Outcome:
        try:
            picture.pixels()
        except TryAgainError:  # of the device
            raise
        except LdmError as error:
            return Outcome(item, FAILED, error=str(error), code=error.exit_code)
        try:
            data = self._session.encode(picture, self._setup.encoding, metadata=self._setup.metadata)
        except ValueError as error:  # no picture, or text that no file can hold: the row's fault, not the disk's
            return Outcome(item, FAILED, error=printable(str(error)), code=LdmError.exit_code)
        path = picture_path(item, self._setup.encoding.ending)
        return Outcome(item, DONE, path, write_picture(self._setup.folder, path, data))


def results(futures: "Iterable[Future[Outcome]]") -> Iterator[Outcome]:
    """What the futures give, in order; then what the first of them raised, if one did."""
    failures = []
    for future in futures:
        failure = future.exception()
        if failure is None:
            yield future.result()
        else:
            failures.append(failure)
    if failures:
        raise failures[0]
