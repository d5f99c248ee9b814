"""Calls that draw: handed to the work, waited for, their pictures made files; given up when their client goes."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from ldmcli.errors import LdmError, printable
from ldmcli.fitting import FittedRequest
from ldmcli.remarks import heard_by
from ldmcli.serving.http.asked import Asked
from ldmcli.serving.http.limits import Refused, check_size
from ldmcli.serving.jobs import Busy, Job
from ldmcli.serving.work import Work
from ldmcli.session import CancelledError, Picture, Progress, Session
from ldmcli.spec import ModelSpec, RuntimeSpec

_READERS, _ENCODERS = 4, 2  # threads that unpack what is sent, and that make pictures files
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A picture as a file, and its size in pixels; `place` is where it stands among those asked for."""

    place: int
    request: FittedRequest
    data: bytes
    size: tuple[int, int]

    @property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")


class Call:
    """A call at work, in the event loop. Of `count` pictures those `drawn` are there, and `step` of `steps` of the
    next."""

    def __init__(self, asked: Asked, model: str, session: Session, worked: Callable[[], object]) -> None:
        self.asked, self.model, self.session, self._worked = asked, model, session, worked
        self.warnings = list(asked.warnings)
        self.count = len(asked.requests)
        self.drawn: list[Drawn] = []
        self.step = self.steps = 0
        self.started = time.time()
        self.job: Job | None = None
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Drawn | Exception] = asyncio.Queue()

    def cancel(self) -> None:
        """Draw no more of it."""
        if self.job is not None:
            self.job.cancel()

    async def pictures(self) -> AsyncGenerator[Drawn]:
        """The pictures as they come. Raises LdmError, CancelledError of a session after `cancel`; whoever ends it early
        cancels the job."""
        assert self.job is not None
        try:
            while len(self.drawn) < self.count:
                arrived = await self._arrived.get()
                if isinstance(arrived, Exception):
                    raise arrived
                self.drawn.append(arrived)
                yield arrived
        finally:
            self.job.cancel()  # which means nothing to one that is done

    # ---- in other threads ----

    def on_step(self, progress: Progress) -> None:
        self.step, self.steps = progress.done, progress.steps

    def on_warning(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and len(self.warnings) < 100:
            self.warnings.append(record.getMessage())

    def on_done(self, error: BaseException | None) -> None:
        self._worked()
        if error is not None:
            self._put(error if isinstance(error, Exception) else RuntimeError(str(error)))

    def encode(self, place: int, picture: Picture) -> None:
        """Make a picture a file."""
        try:
            height, width, _ = picture.pixels().shape
            with heard_by(self.on_warning, set()):
                data = self.session.encode(picture, self.asked.encoding)
        except Exception as error:
            self._put(error)
        else:
            self._put(Drawn(place, picture.request, data, (width, height)))

    def _put(self, arrived: Drawn | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the server has closed
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, arrived)


class Calls:
    """What all calls share: the work, and `models`, those that may be asked for by name, the usual one first."""

    def __init__(
        self,
        work: Work,
        models: Mapping[str, ModelSpec],
        runtime: RuntimeSpec,
        worked: Callable[[], object] = lambda: None,
    ) -> None:
        """`worked` hears of every call that begins or is done, from any thread."""
        self.work, self.models, self.runtime, self._worked = work, models, runtime, worked
        self._readers = ThreadPoolExecutor(_READERS, "http-read")
        self._encoders = ThreadPoolExecutor(_ENCODERS, "http-encode")

    @property
    def usual(self) -> str:
        """The model of calls that name none."""
        return next(iter(self.models))

    def named(self, name: str) -> str:
        """The model that is called so, or as AUTOMATIC1111 would: `name.safetensors [hash]`. Raises Refused."""
        bare = name.partition(" [")[0].removesuffix(".safetensors").removesuffix(".ckpt").lower()
        for known in self.models:
            if known.lower() in (name.lower(), bare):
                return known
        known = ", ".join(self.models)
        raise Refused(
            f"the model {printable(repr(name), 100)} is not served; there is {known}.",
            404, "model", code="model_not_found",
        )  # fmt: skip

    def session(self, name: str) -> Session:
        """The session of a model that is served; for a thread. Raises LdmError."""
        return self.work.session(self.models[name], self.runtime)

    async def read(self, function: Callable[..., _T], *arguments: object, **named: object) -> _T:
        """What `function` gives in a thread that may take its time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, functools.partial(function, *arguments, **named))

    async def begin(self, asked: Asked, usual: str | None = None) -> Call:
        """Hand what is asked for to the work. Raises Refused, LdmError."""
        name = self.named(asked.model) if asked.model else usual or self.usual
        call = Call(asked, name, await self.read(self.session, name), self._worked)
        await self.read(self._submit, call)
        return call

    def _submit(self, call: Call) -> None:
        self._worked()
        requests = call.asked.requests
        with heard_by(call.on_warning, set()):
            first = call.session.fit(call.asked.adapted(requests[0], call.session.config))
            check_size(*first.final_size, len(requests))
            call.asked.encoding.check_size(*first.final_size)
            try:
                call.job = self.work.submit(
                    self.models[call.model],
                    self.runtime,
                    [first.with_seed(request.seed) for request in requests],
                    on_picture=lambda place, picture: self._encoders.submit(call.encode, place, picture),
                    on_step=call.on_step,
                    on_warning=call.on_warning,
                    on_done=call.on_done,
                )
            except Busy as error:
                raise Refused(str(error), 503, retry_after=math.ceil(error.retry_after)) from None

    async def all_pictures(self, call: Call, request: Request) -> list[Drawn]:
        """The pictures of a call in their order. Raises as `Call.pictures`, and ClientDisconnect."""

        async def collected() -> list[Drawn]:
            return [drawn async for drawn in call.pictures()]

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        work, watch = asyncio.ensure_future(collected()), asyncio.ensure_future(gone())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return sorted(work.result(), key=lambda drawn: drawn.place)
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    def close(self) -> None:
        for threads in (self._readers, self._encoders):
            threads.shutdown(wait=False, cancel_futures=True)


def status_of(error: LdmError) -> int:
    """The HTTP status of an error that drawing raises."""
    return 503 if isinstance(error, CancelledError) else {2: 400, 65: 400, 75: 503}.get(error.exit_code, 500)
