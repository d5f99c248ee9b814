"""Drawing on this machine: one device in this process, several in a process each, fed from one plan."""

import contextlib
import dataclasses
import logging
import logging.handlers
import multiprocessing
import os
import re
import signal
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from ldmcli.batch.dispatch import POLL, Batch, Dispatcher, Feed, RemoteWorker, Stop
from ldmcli.batch.items import Item, Outcome, Setup
from ldmcli.batch.pictures import clean_temporaries
from ldmcli.errors import LdmError, UsageError, printable
from ldmcli.speed.cpu.threads import available_cores
from ldmcli.speed.linking import settle_down
from ldmcli.speed.startup import quicken

if TYPE_CHECKING:
    from ldmcli.batch.worker import OpenSession, Worker

MAX_WORKERS = 256
_PART = re.compile(r"(?:(?P<device>cpu|auto|cuda(?::\d{1,3})?)|(?P<number>\d{1,3}))(?:\*(?P<times>\d{1,3}))?", re.ASCII)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_READY = "ready"  # the message of a process that has loaded its model
_PATIENCE = 5  # s that a process has to end by itself
_log = logging.getLogger(__name__)


def parse_devices(text: str) -> tuple[str, ...]:
    """One device for each worker, as `--device` names them; `("all",)` for all, which only torch can count.

    Numbers are GPUs; `*N` puts N workers on a device. Raises UsageError.
    """
    parts = [part.strip() for part in text.split(",")]
    if parts == ["all"]:
        return ("all",)
    devices: list[str] = []
    for part in parts:
        found = _PART.fullmatch(part)
        if found is None:
            raise UsageError(
                f"devices {printable(repr(text))} are not known; name all, or some of 0, 1, …, cuda:N, cpu, joined by "
                "commas, each with *N for N workers on it."
            )
        times = int(found["times"] or 1)
        if not 1 <= times <= MAX_WORKERS - len(devices):
            raise UsageError(f"devices {printable(repr(text))} ask for a number of workers outside 1 to {MAX_WORKERS}.")
        devices += [found["device"] or f"cuda:{int(found['number'])}"] * times
    return tuple(devices)


def present(devices: Sequence[str]) -> Sequence[str]:
    """`devices` with all GPUs of this machine in place of `all`, or its CPU where there is none."""
    if tuple(devices) != ("all",):
        return devices
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(f"cuda:{i}" for i in range(count)) or ("cpu",)


def cores_each(devices: Sequence[str], cores: int) -> int:
    """How many cores each of several workers gets: all there are, shared out among those on the CPU, or among all."""
    return max(1, cores // (list(devices).count("cpu") or len(devices) or 1))


def run_local(
    setup: Setup,
    batches: Iterable[Sequence[Item]],
    devices: Sequence[str],
    *,
    stop: Stop,
    open_session: "OpenSession | None" = None,
) -> Generator[Outcome]:
    """Draw all batches on these devices, each with its share of the cores; outcomes come as they are on the disk.
    Raises LdmError when the run cannot go on, after what was in hand is noted. `batches` is read in a thread of its
    own, a little ahead. `open_session` opens what draws where that is this process alone.

    On `stop`, batches in hand are finished and no more taken. Closing the iterator stops at once.
    """
    devices = present(devices)
    if len(devices) == 1:
        feed = contextlib.closing(Feed(map(Batch, batches), stop))
        with feed as plan, _worker(_on(setup, devices[0]), "worker-0", open_session) as worker:
            yield from worker.run(plan)
        return
    cores = cores_each(devices, available_cores())
    with contextlib.closing(Dispatcher(setup.folder, batches, stop)) as dispatcher:
        yield from _run_processes([_on(setup, device, cores) for device in devices], dispatcher)


def _on(setup: Setup, device: str, cores: int | None = None) -> Setup:
    """The setup on another device, with so many cores."""
    return dataclasses.replace(setup, runtime=dataclasses.replace(setup.runtime, device=device, cores=cores))


@contextlib.contextmanager
def _worker(setup: Setup, name: str, open_session: "OpenSession | None" = None) -> Iterator["Worker"]:
    session = open_session(setup) if open_session else None
    if session is None or not session.remote:
        quicken()
    from ldmcli.batch.worker import Worker

    with contextlib.closing(Worker(setup, name, session)) as worker:
        settle_down()
        yield worker


# ---- the parent of several ----


def _run_processes(setups: Sequence[Setup], dispatcher: Dispatcher) -> Iterator[Outcome]:
    """Feed a process for each setup until nothing is left, in the plan or in hand; then raise what went wrong."""
    processes = [_Process(setup, f"worker-{i}") for i, setup in enumerate(setups)]
    try:
        while processes:
            dispatcher.hand_out(processes)
            by_pipe = {process.pipe: process for process in processes}
            for pipe in wait(by_pipe, POLL):
                assert isinstance(pipe, Connection)
                process = by_pipe[pipe]
                if (message := process.receive()) is not None:
                    yield from _taken(message, process, dispatcher)
                    continue
                processes.remove(process)
                process.join()
                if not process.finishing and not dispatcher.ending:
                    yield from _settled(process, dispatcher)
                    processes.append(process.replacement())
        if dispatcher.failure is not None:
            raise dispatcher.failure
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        if processes:  # killed, maybe while they wrote
            clean_temporaries(setups[0].folder)


def _taken(message: Any, process: "_Process", dispatcher: Dispatcher) -> Iterator[Outcome]:
    """What a message of a process comes to."""
    if isinstance(message, Outcome):
        process.done(message)
        yield message
    elif isinstance(message, logging.LogRecord):
        if dispatcher.is_news(message.getMessage(), process.name):
            logging.getLogger(message.name).handle(message)
    elif isinstance(message, Exception):
        dispatcher.failure = dispatcher.failure or message
    elif message == _READY:
        process.ready = True
        dispatcher.started(lived=True)


def _settled(process: "_Process", dispatcher: Dispatcher) -> Iterator[Outcome]:
    """What becomes of the batches of a process that died."""
    _log.warning("%s died (%s); starting another", process.name, process.exit_reason)
    if not process.ready:
        dispatcher.started(lived=False)
    yield from dispatcher.died(process.held)


class _Process(RemoteWorker):
    """The parent's end of a worker process. `pipe` has something to receive when the process has written something or
    is gone."""

    def __init__(self, setup: Setup, name: str) -> None:
        super().__init__(f"{name} ({setup.runtime.device})")
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
        self.kill = self._process.kill
        # The process ignores SIGTERM, with which multiprocessing ends what is left at the interpreter's exit.
        weakref.finalize(self, self.kill)
        theirs.close()  # so that its end is the child's alone, whose death closes it

    @property
    def exit_reason(self) -> str:
        """How a dead process ended, in words."""
        code = self._process.exitcode
        return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def give(self, batch: Batch) -> None:
        """A process that is dead is found out when it is listened to."""
        self.held.append(batch)
        with contextlib.suppress(OSError):
            self.pipe.send(batch)

    def finish(self) -> None:
        """Nothing is in hand where it still loads."""
        if self.finishing:
            return
        self.finishing = True
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        if not self.ready:
            self.kill()

    def receive(self) -> Any:
        """The next message; None where the process is gone."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def done(self, outcome: Outcome) -> None:
        """Take an item that is done with out of what is held."""
        left = (
            dataclasses.replace(batch, items=tuple(i for i in batch.items if i.number != outcome.item.number))
            for batch in self.held
        )
        self.held = [batch for batch in left if batch.items]

    def join(self) -> None:
        """Let go of a process that is ending."""
        self._process.join(_PATIENCE)
        self.kill()
        self._process.join()
        self.pipe.close()

    def replacement(self) -> "_Process":
        """Another process in place of this one."""
        return _Process(*self._arguments)


# ---- the child ----


def _work(pipe: Connection, setup: Setup, name: str, level: int) -> None:
    """The life of a worker process. Other errors than those that end the run kill it: it is replaced."""
    for number in _SIGNALS:  # a terminal sends them to the whole group; the parent decides what they mean
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # results are the parent's to print
    sender = _Sender(pipe)  # type: ignore[arg-type]
    logger = logging.getLogger("ldmcli")
    logger.handlers[:] = [sender]
    logger.setLevel(level)
    logger.propagate = False
    stop = Stop()
    feed = Feed(_received(pipe, stop), stop)  # from the beginning: the parent may be gone while the model loads
    try:
        with _worker(setup, name) as worker:
            sender.enqueue(_READY)
            for outcome in worker.run(feed):
                sender.enqueue(outcome)
    except Exception as error:
        from ldmcli.session.drawing import DeviceLostError

        if not isinstance(error, LdmError | OSError) or isinstance(error, DeviceLostError):
            _log.warning("%s: %s", type(error).__name__, error)
            os._exit(1)
        with contextlib.suppress(OSError):  # nobody is there to hear it
            sender.enqueue(error)


def _received(pipe: Connection, stop: Stop) -> Iterator[Batch]:
    """What the parent sends; None: stop after the batch in hand. When the parent is gone the process ends on the spot:
    what is on the disk is sound at any instant."""
    while True:
        try:
            batch = pipe.recv()
        except (EOFError, OSError):
            os._exit(1)
        if batch is None:
            stop.request()
        else:
            yield batch


class _Sender(logging.handlers.QueueHandler):
    """Sends messages to the parent, log records among them, from any thread."""

    def enqueue(self, record: Any) -> None:
        self.acquire()  # again, where it is a record
        try:
            self.queue.send(record)  # type: ignore[attr-defined]
        finally:
            self.release()
