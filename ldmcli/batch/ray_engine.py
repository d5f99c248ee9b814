"""Drawing on many machines: an actor of Ray's on each GPU, which loads the model once and draws batches as tasks.

Ray schedules, restarts and retries; what is done is what the manifests and pictures in the shared folder say. Ray is
imported here alone, and only where it is asked for.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from ldmcli.batch.dispatch import HELD, POLL, Batch, Dispatcher, RemoteWorker, StartError, Stop, noted
from ldmcli.batch.items import Item, Outcome, Setup
from ldmcli.errors import LdmError, UsageError, printable

_PATIENCE = 10  # s for a cluster's head to answer
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_log = logging.getLogger(__name__)


def run_ray(
    setup: Setup,
    batches: Iterable[Sequence[Item]],
    *,
    address: str | None = None,
    workers: int | None = None,
    stop: Stop,
) -> Generator[Outcome]:
    """Draw all batches on the Ray cluster at `address`, or on one of this machine's own for this run; by so many
    workers, or one a GPU. Otherwise as `local.run_local`. The machines must share the folder and have the model under
    the same name.

    Raises UsageError where Ray is not installed, StartError where there is no cluster at the address.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray, which is not installed; pip install 'ldmcli[ray]'.")
    with contextlib.closing(Dispatcher(setup.folder, batches, stop)) as dispatcher:
        try:
            _connect(address)
            yield from _run_actors(_actors(setup, workers), dispatcher)
        finally:
            import ray

            ray.shutdown()


@dataclasses.dataclass(frozen=True)
class Report:
    """How a batch came out, and what ends the run, if anything."""

    outcomes: Sequence[Outcome] = ()
    error: Exception | None = None


class RayWorker:
    """The actor: a Worker in a process of Ray's. Its methods run in threads, one batch drawn while another is written.

    What ends the run is returned, not raised: Ray would wrap it, and drop what could still be noted.
    """

    def __init__(self, setup: Setup, name: str) -> None:
        import ray

        self._setup = setup
        # Another process may still write under the name of one that Ray has given up for dead.
        self._name = re.sub(r"[^\w.-]", "-", f"{name}-{socket.gethostname()[:60]}-{os.getpid()}", flags=re.ASCII)
        self._worker: Any = None
        self._drawing = threading.Lock()
        self._stopped = False
        # Ray repeats the tasks of an actor that died; they may have been done but for the report.
        self._doubtful = HELD if ray.get_runtime_context().was_current_actor_reconstructed else 0

    def open(self) -> Report:
        """Load the model, unless it is loaded."""
        from ldmcli.batch.worker import Worker

        try:
            self._worker = self._worker or Worker(self._setup, self._name)
        except (LdmError, OSError) as error:
            return Report(error=error)
        return Report()

    def draw(self, batch: Batch) -> Report:
        """Draw what of a batch is not done."""
        from ldmcli.session.drawing import DeviceLostError

        with self._drawing:
            report = self.open()
            if self._stopped or report.error:
                return report
            doubtful = batch.attempts > 1 or self._doubtful > 0
            self._doubtful -= 1
            done = noted(self._setup.folder, batch.items) if doubtful else {}
            try:
                left = [item for item in batch.items if item.number not in done]
                futures = self._worker.submit(left, batch.attempts) if left else []
            except DeviceLostError:
                os._exit(1)  # Ray starts the actor again, on a device that works
        outcomes = [*done.values(), *(f.result() for f in futures if f.exception() is None)]
        failure = next((error for f in futures if (error := f.exception())), None)
        if isinstance(failure, DeviceLostError):
            os._exit(1)  # what was done is in the manifest
        return Report(outcomes, failure)

    def stop(self) -> None:
        """Draw nothing more; what is in hand is finished."""
        self._stopped = True


class _Actor(RemoteWorker):
    """An actor, as the driver sees it."""

    def __init__(self, name: str, handle: Any) -> None:
        super().__init__(name)
        self.tasks: dict[Any, Batch | None] = {handle.open.remote(): None}  # under way; without a batch it loads
        self._handle = handle

    def give(self, batch: Batch) -> None:
        self.held.append(batch)
        self.tasks[self._handle.draw.remote(batch)] = batch

    def finish(self) -> None:
        if not self.finishing:
            self.finishing = True
            self._handle.stop.remote()


def _actors(setup: Setup, workers: int | None) -> list[_Actor]:
    import ray

    count, share = _shares(ray.cluster_resources(), workers, on_cpu=setup.runtime.device == "cpu")
    # One method draws, others write what they drew, and stop() must find a thread free.
    options = {"max_restarts": -1, "max_task_retries": 1, "max_concurrency": HELD + 1, **share}
    actor = ray.remote(**options)(RayWorker)
    names = [f"ray-{i}" for i in range(count)]
    return [_Actor(name, actor.remote(setup, name)) for name in names]


def _run_actors(actors: Sequence[_Actor], dispatcher: Dispatcher) -> Iterator[Outcome]:
    """Feed all actors until nothing is left, in the plan or in hand; then raise what went wrong, if anything."""
    import ray

    while any(actor.held or not actor.finishing for actor in actors):
        dispatcher.hand_out(actors)
        by_task = {task: actor for actor in actors for task in actor.tasks}
        for task in ray.wait(list(by_task), timeout=POLL)[0] if by_task else ():
            yield from _taken(task, by_task[task], dispatcher)
    if dispatcher.failure is not None:
        raise dispatcher.failure


def _taken(task: Any, actor: _Actor, dispatcher: Dispatcher) -> Iterator[Outcome]:
    """What came of a task."""
    import ray

    batch = actor.tasks.pop(task)
    if batch is not None:
        actor.held.remove(batch)
    try:
        report = ray.get(task)
    except ray.exceptions.RayError as error:
        reason = _first_line(error)
        if batch is None:
            failure = StartError(f"a worker of Ray's cannot be started: {reason}.")
            dispatcher.failure = dispatcher.failure or failure
            return
        _log.warning("%s died over a batch (%s)", actor.name, reason)
        yield from dispatcher.died([batch])
        return
    dispatcher.failure = dispatcher.failure or report.error
    actor.ready = True
    yield from report.outcomes


def _connect(address: str | None) -> None:
    """Join the cluster, or start one that ends with this process; none of Ray's own messages are shown."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "(?s).")  # its nodes' lines would go to standard output
    if address is None:
        _require_token()
    import ray  # which reads its environment when it is imported

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            _check_reachable(address)
            # Its token is in RAY_AUTH_TOKEN, or where else Ray looks for it.
            ray.init(address=address, **quiet)
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        reason = _first_line(error)
        if address is None:
            raise StartError(f"Ray cannot be started: {reason}.") from error
        raise StartError(
            f"the Ray cluster at {printable(address)} cannot be used ({reason}); see that it is there, and "
            "its token in RAY_AUTH_TOKEN."
        ) from error
    finally:
        for number, handler in handlers.items():  # Ray takes SIGTERM for itself
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    """Raise OSError where nobody answers at HOST:PORT; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isascii() and port.isdigit():
        with socket.create_connection((host, int(port)), _PATIENCE):
            pass


def _require_token() -> None:
    """Let a cluster of one's own answer nobody without its token: whoever can reach its ports could run what he likes.
    What the user has chosen stands; else the token is a new one, which nobody else needs."""
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _shares(resources: dict[str, float], workers: int | None, *, on_cpu: bool) -> tuple[int, dict[str, float]]:
    """How many actors, and what of the cluster each gets."""
    gpus = 0 if on_cpu else int(resources.get("GPU", 0))
    if gpus:
        count = workers or gpus
        return count, {"num_gpus": min(1.0, gpus / count), "num_cpus": 1}
    count = workers or 1
    return count, {"num_cpus": max(1, int(resources.get("CPU", 1)) // count)}


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().partition("\n")[0].rstrip("."))
