"""Drawing on many machines: an actor of Ray's on each GPU, which loads the model once and draws batches as tasks.

Ray schedules, restarts and retries; what is done is what the manifests and pictures in the shared folder say. Ray is
imported here alone, and only where it is asked for.
"""

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

from ldmcli.batch.dispatch import HELD, Dispatcher, StartError, noted
from ldmcli.batch.feed import Batch, Feed, Stop
from ldmcli.batch.items import Item, Outcome, Setup
from ldmcli.errors import LdmError, UsageError, printable

_POLL = 0.1  # s between looks at the plan and at whether to stop
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
) -> Generator[Outcome, None, None]:
    """Draw all batches on the Ray cluster at `address`, or on one of this machine's own for this run; by so many
    workers, or one a GPU. Otherwise as `local.run_local`. The machines must share the folder and have the model under
    the same name.

    Raises UsageError where Ray is not installed, StartError where there is no cluster at the address.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray, which is not installed; pip install 'ldmcli[ray]'.")
    feed = Feed(batches, stop)
    try:
        _connect(address)
        yield from _Actors(setup, feed, workers, stop).run()
    finally:
        feed.close()
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
        # Ray repeats the tasks of an actor that died; they may have been done but for telling.
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
            done = self._done(batch)
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

    def _done(self, batch: Batch) -> dict[int, Outcome]:
        if self._doubtful <= 0 and batch.attempts == 1:
            return {}
        self._doubtful -= 1
        return noted(self._setup.folder, batch.items)


class _Actors:
    """The actors, and what each has in hand."""

    def __init__(self, setup: Setup, feed: Feed, workers: int | None, stop: Stop) -> None:
        import ray

        self._ray = ray
        self._stop, self._stopped = stop, False
        self._dispatcher = Dispatcher(setup.folder, feed)
        self._failure: BaseException | None = None
        count, share = _shares(ray.cluster_resources(), workers, on_cpu=setup.runtime.device == "cpu")
        # One method draws, others write what they drew, and stop() must find a thread free.
        options = {"max_restarts": -1, "max_task_retries": 1, "max_concurrency": HELD + 1, **share}
        actor = ray.remote(**options)(RayWorker)
        self._actors = [actor.remote(setup, f"ray-{i}") for i in range(count)]
        self._held: list[list[Batch]] = [[] for _ in self._actors]
        self._ready: set[int] = set()
        # What is under way: which actor's, and what batch; none while it loads.
        self._pending: dict[Any, tuple[int, Batch | None]] = {
            actor.open.remote(): (i, None) for i, actor in enumerate(self._actors)
        }

    def run(self) -> Iterator[Outcome]:
        """Feed all actors until nothing is left, in the plan or in hand; then raise what went wrong, if anything."""
        try:
            while True:
                self._hand_out()
                if not any(self._held) and (self._ending or self._dispatcher.over):
                    break
                for reference in self._ray.wait(list(self._pending), timeout=_POLL)[0] if self._pending else ():
                    yield from self._take(reference)
            if self._failure is not None:
                raise self._failure
        finally:
            self._dispatcher.close()

    @property
    def _ending(self) -> bool:
        return self._failure is not None or self._stop.requested

    def _hand_out(self) -> None:
        if self._ending:
            if not self._stopped:
                self._stopped = True
                for actor in self._actors:
                    actor.stop.remote()
            return
        try:
            for i in self._ready:
                while batch := self._dispatcher.next(self._held[i]):
                    self._held[i].append(batch)
                    self._pending[self._actors[i].draw.remote(batch)] = i, batch
        except Exception as error:  # of the plan
            self._failure = error

    def _take(self, reference: Any) -> Iterator[Outcome]:
        """What came of a task."""
        i, batch = self._pending.pop(reference)
        if batch is not None:
            self._held[i].remove(batch)
        try:
            report = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            reason = printable(str(error).strip().partition("\n")[0])
            if batch is None:
                self._failure = self._failure or StartError(f"a worker of Ray's cannot be started: {reason}.")
                return
            _log.warning("ray-%d died over a batch (%s)", i, reason)
            yield from self._dispatcher.died([batch])
            return
        self._failure = self._failure or report.error
        if batch is None:
            self._ready.add(i)
        yield from report.outcomes


def _connect(address: str | None) -> None:
    """Join the cluster, or start one that ends with this process; all of Ray's own talk is left out."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_DEDUP_LOGS_SKIP_REGEX", "(?s)."
    )  # no line of its nodes: they would go to standard output
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
        reason = printable(str(error).strip().partition("\n")[0].rstrip("."))
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
