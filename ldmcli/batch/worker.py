"""What draws the batches of a run on one device, writes the pictures and notes them in its manifest."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from ldmcli.batch.drawing import Artist, Asked, DeviceLostError, Drawn
from ldmcli.batch.feed import Batch, Source
from ldmcli.batch.items import Item, Outcome, Setup
from ldmcli.batch.manifest import DONE, FAILED, ManifestWriter
from ldmcli.batch.pictures import picture_path, write_picture
from ldmcli.checkpoints.identity import model_sha256
from ldmcli.checkpoints.stored_text import remembered
from ldmcli.errors import LdmError, printable
from ldmcli.images.metadata import text_chunks
from ldmcli.images.png import encode_png
from ldmcli.sources import open_sources
from ldmcli.speed.cpu.heap import keep_freed_memory
from ldmcli.speed.policy import choose_runtime, use_threads
from ldmcli.speed.tuning import Tuning

if TYPE_CHECKING:
    from ldmcli.speed.policy import Runtime

_WRITERS = 4  # threads that encode and write; each waits for the disk most of the time


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A batch that the device was asked for."""

    pictures: Sequence[Asked | list[Drawn]]
    attempts: int


class Worker:
    """A loaded model with its own manifest. Its pictures are encoded and written in threads beside the next batch; a
    device that computes by itself gets that before this one is finished.

    On a CPU it computes with as many of the `cores` as suit the model. Raises LdmError where the model cannot be loaded
    or the manifest not be written.
    """

    def __init__(self, setup: Setup, name: str, *, device: str | None = None, cores: int | None = None) -> None:
        self.name = name
        self._setup = setup
        self._options = {**setup.options} | ({"device": device} if device else {})
        options = self._options
        runtime = choose_runtime(options["device"], options["dtype"], options["attention"], Tuning.of(options))
        sources = open_sources(options)
        keep_freed_memory()
        use_threads(options["threads"], sources.model.config.unet, pictures=setup.batch_size, cores=cores)
        self._memory = remembered(enabled=not options["no_cache"])
        self._sources = sources.settled(runtime)
        self._artist = Artist(self._sources.load(runtime, memory=self._memory))
        # Hashed beside the first batch; pictures that tell nothing need no hash.
        model = dataclasses.replace(sources.model, half=runtime.half)
        self._hash = model_sha256(model, self._memory.hashes) if setup.metadata else None
        self._manifest = ManifestWriter(setup.folder, name)
        self._writing = threading.Lock()  # a manifest has one writer at a time
        self._threads = ThreadPoolExecutor(_WRITERS, "png")

    def submit(self, items: Sequence[Item], attempts: int = 1) -> "list[Future[Outcome]]":
        """Draw a batch; how each item came out is told by a future, once it is on the disk.

        What the futures raise, a full disk say, ends the run; so does DeviceLostError.
        """
        return self._write(self._artist.draw(items), attempts)

    def run(self, batches: Source) -> Iterator[Outcome]:
        """Draw batches as they come until there are no more, each while the pictures of the one before are written.

        Raises what ends the run, after all that could still be noted.
        """
        writing: list[Future[Outcome]] = []
        begun: _Begun | None = None
        try:
            while not batches.over:
                batch = batches.get()
                following = self._begin(batch)
                if begun or following:
                    # Told of while the device is at work on the following: whoever hands out batches waits for that.
                    done, begun = begun, following
                    before, writing = [*writing, *self._finish(done)], []
                    yield from results(before)
                if not following:
                    drawn = self.submit(batch.items, batch.attempts) if batch else []
                    before, writing = writing, drawn
                    yield from results(before)
            done, begun = begun, None
            writing = [*writing, *self._finish(done)]
        except Exception as error:
            if begun and not isinstance(error, DeviceLostError):
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    writing = [*writing, *self._finish(begun)]
            yield from (future.result() for future in writing if future.exception() is None)
            raise
        yield from results(writing)

    def close(self) -> None:
        """Wait for what is being written, and let go of the manifest."""
        self._threads.shutdown()
        self._memory.prompts.flush()
        self._manifest.close()

    def _begin(self, batch: Batch | None) -> "_Begun | None":
        """Ask the device for a batch, where it computes by itself."""
        if batch is None or not self._artist.works_ahead:
            return None
        return _Begun(self._artist.begin(batch.items), batch.attempts)

    def _finish(self, begun: "_Begun | None") -> "list[Future[Outcome]]":
        return self._write(self._artist.finish(begun.pictures), begun.attempts) if begun else []

    def _write(self, pictures: Sequence[Drawn], attempts: int) -> "list[Future[Outcome]]":
        return [self._threads.submit(self._commit, drawn, attempts) for drawn in pictures]

    def _commit(self, drawn: Drawn, attempts: int) -> Outcome:
        """Write a picture and then its line."""
        outcome = dataclasses.replace(self._written(drawn), attempts=attempts, worker=self.name, seconds=drawn.seconds)
        with self._writing:
            self._manifest.append(outcome)
        return outcome

    def _written(self, drawn: Drawn) -> Outcome:
        if drawn.pixels is None:
            return Outcome(drawn.item, FAILED, error=drawn.error, code=drawn.code)
        text = self._text(drawn.item, drawn.runtime)
        try:
            data = encode_png(drawn.pixels, text)
        except ValueError as error:  # no picture, or text that PNG cannot hold: the row's fault, not the disk's
            return Outcome(drawn.item, FAILED, error=printable(str(error)), code=LdmError.exit_code)
        path = picture_path(drawn.item)
        return Outcome(drawn.item, DONE, path, write_picture(self._setup.folder, path, data))

    def _text(self, item: Item, runtime: "Runtime") -> dict[str, str]:
        if self._hash is None:
            return {}
        # Which of several GPUs it was is the manifest's to say; the file is the same from each.
        told = runtime.to_dict() | {"device": runtime.device.type}
        return text_chunks(item.request, self._sources.identity(self._options, self._hash.result()), told)


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
