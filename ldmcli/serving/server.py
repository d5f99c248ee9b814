"""The server of one user's commands, on a Unix socket: each client has a session of its own, opened from its folder as
the command itself would, and the models that these draw with are shared."""

import contextlib
import functools
import logging
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ldmcli import __version__
from ldmcli.errors import LdmError, printable
from ldmcli.fitting import FittedRequest
from ldmcli.images.formats import Encoding
from ldmcli.named_files import if_there, with_files
from ldmcli.remarks import heard_by
from ldmcli.serving.openings import Openings
from ldmcli.serving.place import agreement, in_folder, peer_is_user
from ldmcli.serving.upscalers import Enlarging, Upscalers
from ldmcli.serving.wire import error_to_dict, fitted_from_dict, receive, send
from ldmcli.serving.work import Busy, Job, Work
from ldmcli.session import Picture, Progress, Session
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec

_MAX_CLIENTS = 256
_POLL_S = 0.05  # between looks for room in the queue
_GREETING_S = 30.0  # that a client has to greet
_log = logging.getLogger(__name__)


class Server:
    """Serves clients until it is stopped, or had nothing to do for `idle` seconds."""

    def __init__(self, work: Work, *, idle: float | None = None) -> None:
        self.work = work
        self._idle = idle
        self._agreement = agreement()
        self.openings, self.upscalers = Openings(), Upscalers()
        self._started = time.monotonic()
        self._clients: set[_Client] = set()
        self._woken, self._wake = socket.socketpair()
        self.stopping = False
        self._last = time.monotonic()  # when there last was something to do

    def stop(self) -> None:
        """Have `serve` return."""
        self.stopping = True
        self._wake.send(b"\0")

    def serve(self, listener: socket.socket) -> None:
        """Answer clients. Their work ends with this."""
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self.stopping and (left := self._left()) > 0:
                if any(key.fileobj is listener for key, _ in selector.select(left)):
                    self._accept(listener)
        for client in list(self._clients):
            client.close()

    def left(self, client: "_Client") -> None:
        """Take note that a client has gone, and that one is if the device is lost."""
        self._clients.discard(client)
        if self.work.failure is not None:
            self.stop()

    def agrees(self, with_: str) -> bool:
        """Whether a client's command would draw what this process draws."""
        return with_ == self._agreement

    def worked(self) -> None:
        """Take note that there was something to do just now, and if the device is lost."""
        self._last = time.monotonic()
        if self.work.failure is not None:
            self.stop()

    def status(self) -> dict[str, Any]:
        """What `ldm serve --status` shows."""
        now, models = self.work.progress(), self.work.models()
        return {
            "pid": os.getpid(),
            "version": __version__,
            "seconds": round(time.monotonic() - self._started, 1),
            "models": [each.name for each in models if each.loaded],
            "clients": len(self._clients) - 1,  # less the one that asks
            "step": now.step,
            "steps": now.steps,
            "queued": now.queued,
            "drawn": now.drawn,
            "failed": now.failed,
        }

    def _left(self) -> float:
        """Seconds until it has been idle for long enough."""
        if self._idle is None:
            return 3600.0
        now = self.work.progress()
        if now.jobs or now.queued:
            self.worked()
        return min(3600.0, self._last + self._idle - time.monotonic())

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:  # gone again, or too many files are open
            _log.debug("a client could not be accepted: %s", error)
            time.sleep(0.01)
            return
        if len(self._clients) >= _MAX_CLIENTS or not peer_is_user(connection):
            connection.close()
            return
        client = _Client(self, connection)
        self._clients.add(client)
        client.start()


class _Client:
    """One client: a thread reads what it asks for, another writes what it is told. When it is gone, so is its work."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self._server, self._work, self._socket = server, server.work, connection
        self._out: queue.SimpleQueue[dict[str, Any] | Callable[[], dict[str, Any]] | None] = queue.SimpleQueue()
        self._jobs: list[Job] = []
        self._level = logging.INFO
        self._said: set[str] = set()
        self._folder, self._model, self._runtime = "/", ModelSpec(), RuntimeSpec()
        self._session: Session | None = None
        self._typed: dict[str, str] = {}  # what files are called by the client, by their paths
        self.enlarging = Enlarging(server.work, server.openings, server.upscalers, self._repeat, self._out.put)
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._read, self._write)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Let go of the client."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    # ---- the thread that reads ----

    def _read(self) -> None:
        try:
            self._socket.settimeout(_GREETING_S)
            hello = receive(self._socket)
            agreed = self._server.agrees(str(hello.get("hello")))
            self._level = int(hello.get("level", logging.INFO))
            self._out.put({"agreed": agreed, "version": __version__, "pid": os.getpid()})
            self._socket.settimeout(None)
            with heard_by(self._tell, self._said):
                while True:
                    self._answer(receive(self._socket), agreed)
        except (OSError, ValueError, TypeError) as error:
            _log.debug("a client has gone (%s)", error)
        finally:
            for job in self._jobs:
                job.cancel()
            self._out.put(None)
            self.close()

    def _answer(self, message: dict[str, Any], agreed: bool) -> None:
        """Do what is asked for, and reply; what takes the device replies once it is done."""
        name = message.pop("call", None)
        at_once = _AT_ONCE.get(str(name)) if agreed or name in ("status", "stop") else None
        later = _LATER.get(str(name)) if agreed else None
        self._jobs = [job for job in self._jobs if not job.done]
        if name != "status":  # whoever watches keeps no server from its end
            self._server.worked()
        try:
            if at_once:
                self._out.put({"reply": at_once(self, **message)})
            elif later and not self._jobs:
                self._jobs.append(later(self, **message))
            else:
                self._out.put({"error": f"there is no {printable(str(name))} to call now."})
        except OSError as error:
            self._out.put({"error": f"input or output failed: {error}"})
        except Exception as error:
            _log.debug("a call failed", exc_info=not isinstance(error, LdmError))
            self._out.put({"error": f"{type(error).__name__}: {error}"})

    def open(self, cwd: str, model: dict[str, Any], runtime: dict[str, Any], fetched: dict[str, str]) -> Any:
        self._folder, self._runtime = cwd, RuntimeSpec(**runtime)
        self._session = self._server.openings.session(cwd, ModelSpec(**model), self._runtime, fetched, self._repeat)
        with in_folder(cwd):
            self._model = self._session.resolved
        if self._session.undecided:
            self._share()
        session, loaded = self._session, self._work.holds(self._work.session(self._model, self._runtime))
        facts = {"name": session.name, "family": session.family, "token_limit": session.token_limit}
        return facts | {"loaded": loaded}

    @property
    def _opened(self) -> Session:
        if self._session is None:
            raise LdmError("no model is open.")
        return self._session

    def _share(self) -> Session:
        """The session that draws; the client's knows what that one does."""
        drawing = self._work.session(self._model, self._runtime)
        if self._opened.undecided:
            with heard_by(None, set()):  # the client's own session says it
                drawing.config  # noqa: B018  to find it out
        self._opened.share(drawing)
        return drawing

    def _patiently(self, put: Callable[[], Job]) -> Job:
        """A job, once there is room in the queue: who would be refused would draw by himself, and slow all down."""
        while True:
            try:
                return put()
            except Busy:
                if self._server.stopping:
                    raise
                time.sleep(_POLL_S)

    def fit(self, request: dict[str, Any]) -> FittedRequest:
        with in_folder(self._folder):
            fitted = self._opened.fit(GenerationRequest(**request))
            self._opened.embeddings(fitted)  # whose files are found from here
        return fitted

    def cut_text(self, text: str, request: dict[str, Any]) -> str:
        with in_folder(self._folder):
            return self._opened.cut_text(text, fitted_from_dict(request))

    def word_hint(self, request: dict[str, Any]) -> str:
        with in_folder(self._folder):
            return self._opened.word_hint(fitted_from_dict(request))

    def embeddings(self, request: dict[str, Any], named: bool) -> list[dict[str, str]]:
        with in_folder(self._folder):
            return self._opened.embeddings(fitted_from_dict(request), named=named)

    def runtime(self) -> dict[str, str]:
        return self._opened.runtime.to_dict()

    def status(self) -> dict[str, Any]:
        return self._server.status()

    def stop(self) -> dict[str, Any]:
        self._server.stop()
        return self._server.status()

    # ---- what waits for the device ----

    def load(self, first: list[dict[str, Any]]) -> Job:
        requests = self._resolved([fitted_from_dict(each) for each in first])
        drawing = self._share()
        return self._patiently(lambda: self._work.load(drawing, requests, on_warning=self._tell, on_done=self._done))

    def _resolved(self, requests: list[FittedRequest]) -> list[FittedRequest]:
        """The same requests, with files named so that they are found from any folder."""

        def there(path: str) -> str:
            if (found := if_there(path)) != path:
                self._typed[found] = path
            return found

        with in_folder(self._folder):
            return [with_files(request, there) for request in requests]

    def draw(self, requests: list[dict[str, Any]], encoding: dict[str, Any], metadata: bool, preview: int) -> Job:
        typed = [fitted_from_dict(each) for each in requests]
        drawing, how = self._share(), Encoding(**encoding)

        def on_picture(place: int, picture: Picture) -> None:
            phases = {} if place else drawing.stopwatch.report()["phases"]
            self._out.put(functools.partial(self._file, picture, typed[place], how, metadata, phases))

        submitted = threading.Event()

        def on_step(progress: Progress) -> None:
            submitted.wait()
            step = {"event": "step", "done": progress.done, "steps": progress.steps, "count": job.at_once}
            seen = progress.preview() if preview and progress.done % preview == 0 else []
            self._out.put(step | {"preview": seen})

        resolved = self._resolved(typed)
        job = self._patiently(
            lambda: self._work.submit(
                self._model,
                self._runtime,
                resolved,
                on_picture=on_picture,
                on_step=on_step,
                on_warning=self._tell,
                on_done=self._done,
                batch_size=max(1, len(typed)),
            )
        )
        submitted.set()
        return job

    def enlarge(self, source: str, how: dict[str, Any]) -> Job:
        enlarge, session = self.enlarging.prepared(source, how), self.enlarging.session
        call = functools.partial(self._work.call, enlarge, session=session, on_warning=self._tell, on_done=self._done)
        return self._patiently(call)

    def _done(self, error: BaseException | None) -> None:
        self._server.worked()
        self._out.put({"reply": None} if error is None else {"error": f"{type(error).__name__}: {error}"})

    # ---- the thread that writes ----

    def _write(self) -> None:
        try:
            with self._socket:
                while (message := self._out.get()) is not None:
                    send(self._socket, message if isinstance(message, dict) else message())
        except Exception as error:
            _log.debug("a client hears no more (%s)", error)
        finally:
            self.close()
            self._server.left(self)

    def _file(
        self, picture: Picture, typed: FittedRequest, encoding: Encoding, metadata: bool, phases: dict[str, float]
    ) -> dict[str, Any]:
        """A picture as it is sent. Raises DeviceLostError: who is gone is drawn for by nobody."""
        from ldmcli.images.encode import encode_pixels
        from ldmcli.session.drawing import DeviceLostError

        message: dict[str, Any] = {"event": "picture", "phases": phases, "of": "pixels", "identity": {}}
        try:
            pixels = picture.pixels()
            message |= {"of": "file", "seconds": picture.seconds}
            with in_folder(self._folder):  # where the upscaler's file is found
                message["identity"] = self._opened.identity()
            picture.request = typed  # which names files as the client does, for its record
            with heard_by(self._tell, self._said):
                text = {}
                if metadata:
                    with in_folder(self._folder):
                        text = self._opened.record(picture)
                data = encode_pixels(pixels, text, encoding)
            return message | {"data": data}
        except DeviceLostError:
            raise
        except (LdmError, ValueError) as error:
            return message | {"failure": error_to_dict(error, self._as_typed(str(error)))}

    def _tell(self, record: logging.LogRecord) -> None:
        if record.levelno >= self._level:
            self._out.put({"log": record.name, "level": record.levelno, "text": self._as_typed(record.getMessage())})

    def _repeat(self, record: logging.LogRecord) -> None:
        """Tell what was said of files that are as they were."""
        self._said.add(record.getMessage())
        self._tell(record)

    def _as_typed(self, text: str) -> str:
        """A sentence with files called as the client calls them."""
        for there, here in self._typed.items():
            text = text.replace(printable(there), printable(here))
        return text


_AT_ONCE: dict[str, Callable[..., Any]] = {
    "open": _Client.open, "fit": _Client.fit, "cut_text": _Client.cut_text, "embeddings": _Client.embeddings,
    "word_hint": _Client.word_hint,
    "runtime": _Client.runtime, "open_upscaler": lambda client, **given: client.enlarging.open(**given),
    "status": _Client.status, "stop": _Client.stop,
}  # fmt: skip
_LATER: dict[str, Callable[..., Job]] = {"load": _Client.load, "draw": _Client.draw, "enlarge": _Client.enlarge}
