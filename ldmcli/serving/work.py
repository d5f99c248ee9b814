"""The resident models, and the one thread that draws with them: a bounded queue of jobs, some sharing batches."""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ldmcli.errors import LdmError
from ldmcli.fitting import FittedRequest
from ldmcli.remarks import Listener, Relay, heard_by
from ldmcli.serving.jobs import CANCELLED, Busy, Job, OnDone, OnPicture, OnStep, Resident, WorkProgress
from ldmcli.session import CancelledError, Session
from ldmcli.session import Progress as Step
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec
from ldmcli.speed.cpu.threads import is_small

_BATCH_ON_CPU, _BATCH_ON_GPU = 8, 4  # pictures of several jobs drawn together; larger models gain nothing on a CPU
_KEPT_OPEN = 16  # sessions beyond those in memory that are looked at and hold no weights
_ADAPTERS = "ldmcli.adapters"
_MAX_REMARKS = 1000  # doings of which they are kept
_FIRST_GUESS_S = 2.0  # what a picture takes, before one was drawn
__all__ = ["Busy", "Job", "Resident", "Work", "WorkProgress"]
_log = logging.getLogger(__name__)


class Work:
    """Draws jobs one batch at a time with models that stay in memory, `max_models` of them, the last used.

    Requests of several jobs that agree in all but prompts, seed and pictures share batches, unless a job says how many
    of its own are to be drawn at once. A fault or a cancel of one job harms no other.
    """

    def __init__(self, *, max_models: int = 1, max_queue: int = 64) -> None:
        self._max_models, self._max_queue = max_models, max_queue
        self._sessions: dict[tuple[ModelSpec, RuntimeSpec], Session] = {}  # the last used at the end
        self._queue: deque[Job] = deque()
        self._in_hand: list[Job] = []
        self._step = self._steps = self._drawn = self._failed = 0
        self._seconds = _FIRST_GUESS_S  # of a picture, about
        self._closed = False
        self._failure: LdmError | None = None
        self._changed = threading.Condition()
        self._opening = threading.Lock()
        self._remarks: dict[str, list[logging.LogRecord]] = {}  # by what was done when they were made
        self._merging = ""  # what for is drawn just now, as a key of those
        self._relay = Relay()
        logging.getLogger("ldmcli").addHandler(self._relay)
        self._thread = threading.Thread(target=self._work, name="work", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> LdmError | None:
        """Why this process can draw no more, such as a lost device."""
        return self._failure

    def submit(
        self,
        model: ModelSpec,
        runtime: RuntimeSpec,
        requests: Sequence[GenerationRequest | FittedRequest],
        *,
        on_picture: OnPicture | None = None,
        on_step: OnStep | None = None,
        on_warning: Listener | None = None,
        on_done: OnDone | None = None,
        batch_size: int | None = None,
    ) -> Job:
        """Have requests drawn, and return at once. `on_picture` gets each picture with its place among the requests,
        `on_step` how far a batch is, `on_warning` what is logged meanwhile; all in the thread that draws,
        so they must not wait. `on_done` hears, from any thread, that it is done, or why not. With `batch_size` the
        job's requests are drawn as a `Session` draws them, so many at a time, and with no other job's.

        Raises Busy, and LdmError where a request cannot be drawn.
        """
        session = self.session(model, runtime)
        fitted = [r if isinstance(r, FittedRequest) else session.fit(r) for r in requests]
        callbacks: dict[str, Any] = {"on_picture": on_picture, "on_step": on_step, "on_warning": on_warning}
        callbacks["on_done"] = on_done
        return self._put(Job(session, fitted, batch_size=batch_size, **callbacks))

    def call(
        self,
        function: Callable[[Job], object],
        *,
        session: Session | None = None,
        on_warning: Listener | None = None,
        on_done: OnDone | None = None,
    ) -> Job:
        """Have the device do other work when its turn comes: `function` gets the job, whose `check` it calls often, and
        may draw with `session`, of which the model is there. Raises Busy."""

        def work(job: Job) -> None:
            if session is not None:
                self._read(session, (), [job])
            function(job)

        return self._put(Job(session, function=work, on_warning=on_warning, on_done=on_done))

    def session(self, model: ModelSpec, runtime: RuntimeSpec) -> Session:
        """The session that draws such requests, opened from headers; opened anew where a file of its weights has
        changed. Raises LdmError."""
        key = model, runtime
        with self._opening:
            session = self._sessions.pop(key, None)
            if session is None or session.changed:
                with heard_by(None, set()):  # whoever asks has looked at the files, and heard of it
                    session = Session(*key)
            self._sessions[key] = session
            idle = [key for key, each in self._sessions.items() if not each.loaded]
            for old in idle[: max(0, len(idle) - _KEPT_OPEN)]:
                del self._sessions[old]
        return session

    def holds(self, session: Session) -> bool:
        """Whether the weights that `session` draws with are in memory."""
        return session.loaded or self._alike(session) is not None

    def load(
        self,
        session: Session,
        first: Sequence[FittedRequest] = (),
        *,
        on_warning: Listener | None = None,
        on_done: OnDone | None = None,
    ) -> Job:
        """Read a model of `session` now; the prompts of `first` are encoded meanwhile. Raises Busy."""

        def read(job: Job) -> None:
            self._read(session, first, [job])

        return self._put(Job(session, function=read, on_warning=on_warning, on_done=on_done))

    def models(self) -> list[Resident]:
        """The models that were used, the last one first."""
        with self._opening:
            found = list(self._sessions.items())
        return [Resident(*key, session.name, session.loaded) for key, session in reversed(found)]

    def progress(self) -> WorkProgress:
        """What is going on now."""
        with self._changed:
            queued = sum(not job.done and job not in self._in_hand for job in self._queue)
            return WorkProgress(tuple(self._in_hand), self._step, self._steps, queued, self._drawn, self._failed)

    def close(self) -> None:
        """Cancel everything, and give the memory back."""
        with self._changed:
            self._closed = True
            for job in (*self._queue, *self._in_hand):
                job.cancel()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        logging.getLogger("ldmcli").removeHandler(self._relay)
        for session in self._sessions.values():
            session.close()

    # ---- the queue ----

    def _put(self, job: Job) -> Job:
        if not job.requests and job.function is None:
            job.finish()
            return job
        with self._changed:
            if self._failure is not None:
                raise self._failure
            waiting = [each for each in self._queue if not each.done]
            if self._closed or len(waiting) >= self._max_queue:
                pictures = sum(len(each.requests) - each.next for each in waiting)
                raise Busy(max(1.0, pictures * self._seconds))
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def _take(self) -> "list[tuple[Job, int]] | Job | None":
        """What is to be done next: requests to draw together, or other work; None at the end."""
        with self._changed:
            self._in_hand, self._step, self._steps = [], 0, 0
            while True:
                while self._queue and self._queue[0].done:
                    self._queue.popleft()
                if self._queue or self._closed:
                    break
                self._changed.wait()
            if not self._queue:
                return None
            head = self._queue[0]
            if head.function is not None:
                self._queue.popleft()
                self._in_hand = [head]
                return head
            batch = self._together(head)
            for job, place in batch:
                job.next = place + 1
            self._in_hand = list(dict.fromkeys(job for job, _ in batch))
            self._queue = deque(job for job in self._queue if job.function or job.next < len(job.requests))
            self._rotate(head)
            return batch

    def _together(self, head: Job) -> list[tuple[Job, int]]:
        """The next requests to draw, those of `head` first."""
        if head.batch_size is not None:
            return [(head, place) for place in range(head.next, len(head.requests))[: head.batch_size]]
        assert head.session is not None
        settings, most = head.requests[head.next].settings, _most_at_once(head.session)
        alike = (
            (job, place)
            for job in self._queue
            if job.session is head.session and job.batch_size is None and not job.done
            for place in itertools.takewhile(
                lambda place, job=job: job.requests[place].settings == settings,  # type: ignore[misc]
                range(job.next, len(job.requests)),
            )
        )
        return list(itertools.islice(alike, most))

    def _rotate(self, head: Job) -> None:
        """Let others have their turn, unless a model would have to make room for theirs."""
        if len(self._queue) < 2 or self._queue[0] is not head:
            return
        following = self._queue[1].session
        if following is None or self.holds(following) or len(self._loaded()) < self._max_models:
            self._queue.rotate(-1)

    # ---- the thread ----

    def _work(self) -> None:
        while (task := self._take()) is not None:
            jobs = [task] if isinstance(task, Job) else self._in_hand
            try:
                if isinstance(task, Job):
                    self._do(task)
                else:
                    self._draw(task)
            except BaseException as error:
                for job in jobs:
                    job.fail(error)
                self._judge(error)

    def _judge(self, error: BaseException) -> None:
        """Where the device is lost, this process can draw no more."""
        from ldmcli.session.drawing import DeviceLostError

        if isinstance(error, CancelledError):
            return
        _log.debug("a job failed", exc_info=error)
        if isinstance(error, DeviceLostError):
            with self._changed:
                self._failure = error
                for job in self._queue:
                    job.fail(error)

    def _do(self, job: Job) -> None:
        assert job.function is not None
        with heard_by(self._tell, job.said):
            job.function(job)
        job.finish()

    def _draw(self, batch: list[tuple[Job, int]]) -> None:
        jobs, session = list(self._in_hand), batch[0][0].session
        assert session is not None
        for job in jobs:
            job.at_once = sum(each is job for each, _ in batch)

        def on_step(progress: Step) -> None:
            self._step, self._steps = progress.done, progress.steps
            for job in jobs:
                job.step(progress)
            if all(job.done for job in jobs):
                raise CancelledError(CANCELLED)

        requests, said = [job.requests[place] for job, place in batch], set[str]().union(*(job.said for job in jobs))
        self._merging = f"merge {id(session)} {requests[0].loras}"
        self._repeat(self._merging, jobs)
        with heard_by(self._hear, said if len(jobs) > 1 else jobs[0].said):
            self._read(session, requests[:1], jobs)
            session.refresh()
            started = time.perf_counter()
            pictures = session.draw(requests, batch_size=len(batch), on_step=on_step)
            for (job, place), picture in zip(batch, pictures, strict=True):
                with self._changed:
                    self._drawn, self._failed = self._drawn + (not picture.failed), self._failed + picture.failed
                job.arrived(place, picture)
        self._seconds += 0.2 * ((time.perf_counter() - started) / len(batch) - self._seconds)

    def _alike(self, session: Session) -> Session | None:
        """One whose weights in memory `session` could draw with."""
        return next((each for each in self._loaded() if session.draws_as(each)), None)

    def _loaded(self) -> list[Session]:
        return [session for session in list(self._sessions.values()) if session.loaded]

    def _make_room(self, session: Session) -> None:
        """Give the memory of the models back that were not used for the longest time, so that this one may be read."""
        with self._opening:
            others = [each for each in self._loaded() if each is not session]
            for old in others[: max(0, len(others) - self._max_models + 1)]:
                _log.info("%s makes room for %s", old.name, session.name)
                old.close()

    def _read(self, session: Session, first: Sequence[FittedRequest], jobs: Sequence[Job]) -> None:
        """Have a model in memory, and say to each command once what was to be said of reading it."""
        known = f"read {id(session)}"
        if not session.loaded:
            alike = self._alike(session)
            with heard_by(None, set()):
                if alike is None:
                    self._make_room(session)
                session.runtime  # noqa: B018  a command's own session says what there is to say of it
                if alike is not None:
                    session.take_over(alike)
            remarks = self._remarks[known] = [] if alike is None else self._remarks.get(f"read {id(alike)}", [])[:]
            with heard_by(remarks.append, set()):
                session.load(first)
                session.begin_hashing()
        self._repeat(known, jobs)

    def _repeat(self, what: str, jobs: Sequence[Job]) -> None:
        """Say again what was said when something was done that stays done, to those who did not hear it."""
        for job in jobs:
            if what not in job.said:
                job.said.add(what)
                for record in self._remarks.get(what, ()):
                    self._tell(record, [job])

    def _hear(self, record: logging.LogRecord) -> None:
        """Pass on what is said while pictures are drawn. What merging LoRAs says is kept: they stay merged."""
        if record.name.startswith(_ADAPTERS):
            kept = self._remarks.setdefault(self._merging, [])
            while len(self._remarks) > _MAX_REMARKS:
                del self._remarks[next(iter(self._remarks))]
            if any(each.getMessage() == record.getMessage() for each in kept):
                return  # they were merged before, and it was said
            kept.append(record)
        self._tell(record)

    def _tell(self, record: logging.LogRecord, jobs: Sequence[Job] | None = None) -> None:
        """Pass on what is logged about jobs, those in hand."""
        for job in self._in_hand if jobs is None else jobs:
            if job.on_warning is not None and not job.done:
                job.on_warning(record)


def _most_at_once(session: Session) -> int:
    """How many pictures of several jobs are worth drawing together."""
    if session.runtime.device.type != "cpu":
        return _BATCH_ON_GPU
    return _BATCH_ON_CPU if is_small(session.config.unet) else 1
