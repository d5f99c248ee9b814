"""Drawing on this machine: one device in this process, several in a process each, fed from one plan."""

import dataclasses
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait

from ldmcli.batch.devices import cores_each
from ldmcli.batch.dispatch import Dispatcher
from ldmcli.batch.feed import Feed, Stop
from ldmcli.batch.items import Item, Outcome, Setup
from ldmcli.batch.pictures import clean_temporaries
from ldmcli.batch.process import Failed, Ready, WorkerProcess
from ldmcli.speed.cpu.threads import available_cores
from ldmcli.speed.startup import quicken, settle_down

_POLL = 0.1  # s between looks at the plan and at whether to stop
_log = logging.getLogger(__name__)


def run_local(
    setup: Setup, batches: Iterable[Sequence[Item]], devices: Sequence[str], *, stop: Stop
) -> Generator[Outcome, None, None]:
    """Draw all batches on these devices, each with its share of the cores; outcomes come as they are on the disk.
    Raises LdmError when the run cannot go on, after what was in hand is noted. `batches` is read in a thread of its
    own, a little ahead.

    On `stop`, batches in hand are finished and no more taken. Closing the iterator stops at once.
    """
    feed = Feed(batches, stop)
    try:
        if len(devices) == 1:
            yield from _run_here(_on(setup, devices[0]), feed)
        else:
            cores = cores_each(tuple(devices), available_cores())
            yield from _Processes([_on(setup, device, cores) for device in devices], feed, stop).run()
    finally:
        feed.close()


def _on(setup: Setup, device: str, cores: int | None = None) -> Setup:
    """The setup on another device, with so many cores."""
    return dataclasses.replace(setup, runtime=dataclasses.replace(setup.runtime, device=device, cores=cores))


def _run_here(setup: Setup, feed: Feed) -> Iterator[Outcome]:
    quicken()
    from ldmcli.batch.worker import Worker

    worker = Worker(setup, "worker-0")
    settle_down()
    try:
        yield from worker.run(feed)
    finally:
        worker.close()


class _Processes:
    """Processes that draw, and what each has in hand."""

    def __init__(self, setups: Sequence[Setup], feed: Feed, stop: Stop) -> None:
        self._stop, self._folder = stop, setups[0].folder
        self._dispatcher = Dispatcher(self._folder, feed)
        self._failure: Exception | None = None
        self._processes = [WorkerProcess(setup, f"worker-{i}") for i, setup in enumerate(setups)]

    def run(self) -> Iterator[Outcome]:
        """Feed all processes until nothing is left, in the plan or in hand; then raise what went wrong, if anything."""
        try:
            while self._processes:
                self._hand_out()
                by_pipe = {process.pipe: process for process in self._processes}
                for pipe in wait(by_pipe, _POLL):
                    assert isinstance(pipe, Connection)
                    yield from self._listen(by_pipe[pipe])
            if self._failure is not None:
                raise self._failure
        finally:
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.join()
            if self._processes:  # killed, maybe while they wrote
                clean_temporaries(self._folder)
            self._dispatcher.close()

    def _hand_out(self) -> None:
        """Give each process what it may hold, and dismiss those that get nothing more."""
        try:
            for process in self._processes:
                while not self._ending and process.ready and (batch := self._dispatcher.next(process.held)):
                    process.give(batch)
        except Exception as error:  # of the plan
            self._failure = error
        if self._ending or (self._dispatcher.over and not any(process.held for process in self._processes)):
            for process in self._processes:
                process.finish(at_once=self._ending)

    @property
    def _ending(self) -> bool:
        return self._failure is not None or self._stop.requested

    def _listen(self, process: WorkerProcess) -> Iterator[Outcome]:
        """Take one message of a process, or its end."""
        try:
            message = process.receive()
        except (EOFError, OSError):
            yield from self._ended(process)
            return
        if isinstance(message, Outcome):
            process.done(message)
            yield message
        elif isinstance(message, Ready):
            process.ready = True
            self._dispatcher.started(lived=True)
        elif isinstance(message, Failed):
            self._failure = self._failure or message.error
        elif isinstance(message, logging.LogRecord):
            logging.getLogger(message.name).handle(message)

    def _ended(self, process: WorkerProcess) -> Iterator[Outcome]:
        """A process is gone: dismissed, or dead; then settle what it had and put another in its place."""
        process.join()
        self._processes.remove(process)
        if process.finishing or self._ending:
            return
        _log.warning("%s (%s) died (%s); starting another", process.name, process.device, process.exit_reason)
        if not process.ready:
            self._dispatcher.started(lived=False)
        self._processes.append(process.replacement())
        yield from self._dispatcher.died(process.held)
