"""Requests on their way to pictures, as those who wait for them see them."""

import dataclasses
import threading
from collections.abc import Callable, Sequence

from ldmcli.errors import TryAgainError
from ldmcli.fitting import FittedRequest
from ldmcli.images.formats import Encoding
from ldmcli.remarks import Listener, sayings
from ldmcli.session import CancelledError, Picture, Progress, Session
from ldmcli.spec import ModelSpec, RuntimeSpec

CANCELLED = "the work was cancelled."
OnPicture = Callable[[int, Picture], object]
OnStep = Callable[[Progress], object]
OnDone = Callable[[BaseException | None], object]


class Busy(TryAgainError):
    """The queue is full; `retry_after` is in how many seconds there may be room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the server has too much to do; try again in {retry_after:.0f} s.")
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Resident:
    """A model that requests may name again without delay: `loaded` says whether its weights are in memory."""

    model: ModelSpec
    runtime: RuntimeSpec
    name: str
    loaded: bool


@dataclasses.dataclass(frozen=True)
class WorkProgress:
    """What is going on: the jobs whose batch is in hand, its step of how many, how many jobs wait, and how many
    pictures were `drawn` and `failed` since the beginning."""

    jobs: tuple["Job", ...]
    step: int
    steps: int
    queued: int
    drawn: int
    failed: int


class Job:
    """Requests on their way, or other work for the device. Threads may wait for it and cancel it."""

    def __init__(
        self,
        session: Session | None,
        requests: Sequence[FittedRequest] = (),
        *,
        batch_size: int | None = None,
        on_picture: OnPicture | None = None,
        on_step: OnStep | None = None,
        on_warning: Listener | None = None,
        on_done: OnDone | None = None,
        function: "Callable[[Job], object] | None" = None,
    ) -> None:
        self.session, self.requests, self.batch_size = session, requests, batch_size
        self._on_picture, self._on_step, self.on_warning, self.function = on_picture, on_step, on_warning, function
        self.on_done = on_done
        self.said = sayings()  # what its command has heard
        self.next = 0  # the first request that no batch has yet
        self.at_once = 0  # how many of its pictures are drawn together now
        self._left = len(requests)
        self._error: BaseException | None = None
        self._done, self._ending = threading.Event(), threading.Lock()

    @property
    def done(self) -> bool:
        """Whether there is nothing to come: all is drawn, or it failed or was cancelled."""
        return self._done.is_set()

    def cancel(self) -> None:
        """End it now; what it shares a batch with goes on."""
        self.fail(CancelledError(CANCELLED))

    def wait(self, timeout: float | None = None) -> None:
        """Until it is done. Raises what ended it, CancelledError after `cancel`, and TimeoutError where it is not done
        in time. What is wrong with one picture, that picture's `pixels` raises."""
        if not self._done.wait(timeout):
            raise TimeoutError
        if self._error is not None:
            raise self._error

    def check(self) -> None:
        """Raise what ended it, if something did."""
        if self._done.is_set():
            self.wait(0)

    def encode(self, picture: Picture, encoding: Encoding = Encoding(), *, metadata: bool = True) -> bytes:
        """As `Session.encode`."""
        assert self.session is not None
        return self.session.encode(picture, encoding, metadata=metadata)

    # ---- for the thread that works ----

    def fail(self, error: BaseException | None) -> None:
        """End it with an error, or well, unless it is done."""
        with self._ending:
            if self._done.is_set():
                return
            self._error = error
            self._done.set()
        if self.on_done is not None:
            self.on_done(error)

    def finish(self) -> None:
        """It is done."""
        self.fail(None)

    def step(self, progress: Progress) -> None:
        """Tell of a step; whoever cannot hear of it wants no more."""
        self._told(self._on_step, progress)

    def arrived(self, place: int, picture: Picture) -> None:
        """Hand over a picture."""
        self._told(self._on_picture, place, picture)
        self._left -= 1
        if self._left == 0:
            self.finish()

    def _told(self, callback: Callable[..., object] | None, *arguments: object) -> None:
        if callback is None or self._done.is_set():
            return
        try:
            callback(*arguments)
        except Exception as error:
            self.fail(error)
