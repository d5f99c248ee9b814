"""A process that draws for another: how it is started, what it is sent and what it sends back."""

import contextlib
import dataclasses
import logging
import logging.handlers
import multiprocessing
import os
import queue
import signal
import threading
import weakref
from multiprocessing.connection import Connection
from typing import Any

from ldmcli.batch.feed import Batch
from ldmcli.batch.items import Outcome, Setup

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOP = "stop"  # in place of a batch: take no more, not even what is queued; None: take no more after that
_PATIENCE = 5  # s that a process has to end by itself


class Ready:
    """The process has loaded its model."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """What a worker process sends when the run cannot go on: a model that cannot be loaded, a full disk."""

    error: Exception


class WorkerProcess:
    """The parent's end of a worker process. `pipe` has something to receive when the process has sent something or is
    gone."""

    def __init__(self, setup: Setup, name: str) -> None:
        self.name, self.device = name, setup.runtime.device
        self.ready = self.finishing = False
        self.held: list[Batch] = []  # less the items that are done
        self._arguments = (setup, name)
        # Not forked: CUDA and torch's threads do not outlive a fork.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        level = logging.getLogger("ldmcli").getEffectiveLevel()
        self._process = context.Process(
            target=_work, args=(theirs, *self._arguments, level), name=f"ldm {name}", daemon=True
        )
        # Blocked signals stay so in the child: it would die of a Ctrl-C before it could say that it ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # The process ignores SIGTERM, with which multiprocessing ends what is left at the interpreter's exit.
        weakref.finalize(self, self._process.kill)
        theirs.close()  # so that its end is the child's alone, whose death closes it

    @property
    def exit_reason(self) -> str:
        """How a dead process ended, in words."""
        code = self._process.exitcode
        return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def give(self, batch: Batch) -> None:
        """Send a batch. A process that is dead is found out when it is listened to."""
        self.held.append(batch)
        with contextlib.suppress(OSError):
            self.pipe.send(batch)

    def finish(self, *, at_once: bool = False) -> None:
        """Let the process end when it has drawn what it holds; `at_once`: the batch in hand alone, or nothing where it
        still loads."""
        if self.finishing:
            return
        self.finishing = True
        with contextlib.suppress(OSError):
            self.pipe.send(_STOP if at_once else None)
        if not self.ready:
            self._process.kill()

    def receive(self) -> Any:
        """The next message. Raises EOFError or OSError where the process is gone."""
        return self.pipe.recv()

    def done(self, outcome: Outcome) -> None:
        """Take an item that is done with out of what is held."""
        left = (
            dataclasses.replace(batch, items=tuple(i for i in batch.items if i.number != outcome.item.number))
            for batch in self.held
        )
        self.held = [batch for batch in left if batch.items]

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()

    def join(self) -> None:
        """Let go of a process that is ending."""
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def replacement(self) -> "WorkerProcess":
        """Another process in place of this one."""
        return WorkerProcess(*self._arguments)


def _work(pipe: Connection, setup: Setup, name: str, level: int) -> None:
    """The life of a worker process."""
    for number in _SIGNALS:  # a terminal sends them to the whole group; the parent decides what they mean
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # results are the parent's to print
    sender = _Sender(pipe)
    logger = logging.getLogger("ldmcli")
    logger.handlers[:] = [sender]
    logger.setLevel(level)
    logger.propagate = False
    inbox = _Inbox(pipe)
    try:
        _draw(sender, inbox, setup, name)
    except Exception as error:
        _end(sender, error)


def _draw(sender: "_Sender", inbox: "_Inbox", setup: Setup, name: str) -> None:
    from ldmcli.speed.startup import quicken, settle_down

    quicken()
    from ldmcli.batch.worker import Worker

    worker = Worker(setup, name)
    settle_down()
    sender.send(Ready())
    for outcome in worker.run(inbox):
        sender.send(outcome)
    worker.close()


def _end(sender: "_Sender", error: Exception) -> None:
    """Tell the parent of an error that ends the run; die of any other, to be replaced."""
    from ldmcli.errors import LdmError
    from ldmcli.session.drawing import DeviceLostError

    if isinstance(error, LdmError | OSError) and not isinstance(error, DeviceLostError):
        with contextlib.suppress(OSError):  # nobody is there to hear it
            sender.send(Failed(error))
        return
    logging.getLogger(__name__).warning("%s: %s", type(error).__name__, error)
    os._exit(1)


class _Sender(logging.handlers.QueueHandler):
    """Sends messages to the parent, log records among them, from any thread."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__(queue.Queue(1))  # which is never used
        self._pipe = pipe
        self._speaking = threading.Lock()

    def send(self, message: Any) -> None:
        with self._speaking:
            self._pipe.send(message)

    def enqueue(self, record: logging.LogRecord) -> None:
        self.send(record)


class _Inbox:
    """The batches that the parent sends, read in a thread, so that the parent never waits until this process listens.
    When the parent is gone the process ends on the spot: what is on the disk is sound at any instant."""

    def __init__(self, pipe: Connection) -> None:
        self.over = False
        self._pipe = pipe
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="inbox", daemon=True).start()

    def get(self, timeout: float = 0.1) -> Batch | None:
        """See feed.Source."""
        try:
            batch = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if batch is None:
            self.over = True
        return None if self.over else batch

    def _listen(self) -> None:
        while True:
            try:
                message = self._pipe.recv()
            except (EOFError, OSError):
                os._exit(1)
            if message == _STOP:
                self.over = True
            else:
                self._queue.put(message)
