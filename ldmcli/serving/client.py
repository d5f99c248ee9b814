"""The client: a session whose model a server holds. Imports neither torch nor Pillow, nor what opens models."""

import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from ldmcli.fitting import FittedRequest
from ldmcli.images.formats import Encoding
from ldmcli.serving.place import agreement, is_safe, peer_is_user, socket_path
from ldmcli.serving.wire import error_from_dict, fitted_from_dict, receive, send, with_bytes
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec
from ldmcli.stopwatch import Stopwatch

if TYPE_CHECKING:
    from ldmcli.session import Session
    from ldmcli.session.picture import Picture

_GREETING_S = 10.0  # that a server has to answer a greeting
_STARTING_S = 30.0  # … to start
_POLL_S = 0.02
_OF_PROCESSES = ("/dev/", "/proc/")  # where a path may lead elsewhere in another process
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class RefusedError(Exception):
    """The server will not or cannot do it; why, its text says."""


@dataclasses.dataclass(frozen=True)
class Greeting:
    """What a server says of itself: whether it draws what this program would, its version and its process."""

    agreed: bool
    version: str
    pid: int


class Connection:
    """A connection to the server of this user. Close it to end what it does."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._calling = threading.Lock()
        self._heard: collections.Counter[str] = collections.Counter()  # log lines that came from the server
        self._socket.settimeout(_GREETING_S)
        send(self._socket, {"hello": agreement(), "level": logging.getLogger("ldmcli").getEffectiveLevel()})
        reply = receive(self._socket)
        self.greeting = Greeting(bool(reply["agreed"]), str(reply["version"]), int(reply["pid"]))
        self._socket.settimeout(None)

    def call(self, name: str, *, on_event: Callable[[dict[str, Any]], object] | None = None, **arguments: Any) -> Any:
        """Have the server do something, and wait; `on_event` hears what it tells meanwhile. Raises RefusedError, and
        OSError where the server is gone."""
        with self._calling:
            send(self._socket, {"call": name, **arguments})
            while True:
                message = receive(self._socket)
                if "reply" in message:
                    return message["reply"]
                if "error" in message:
                    raise RefusedError(str(message["error"]))
                if "log" in message:
                    self._heard[message["text"]] += 1
                    logging.getLogger(message["log"]).log(message["level"], "%s", message["text"])
                elif on_event:
                    on_event(message)

    def close(self) -> None:
        """Have the server end what it does for this client."""
        self._socket.close()

    def leave(self) -> None:
        """Close it, and go on in this process, which leaves out of the log what the server said before."""
        self.close()
        for handler in logging.getLogger("ldmcli").handlers:
            handler.addFilter(_Repeats(self._heard))

    def wait_for_end(self, seconds: float) -> None:
        """Until the server is gone, or for so long."""
        self._socket.settimeout(seconds)
        with contextlib.suppress(OSError):
            while True:
                receive(self._socket)


def connect(*, any_version: bool = False) -> Connection | None:
    """A connection to the server of this user; None where there is none that draws what this program would. Raises
    UsageError where LDM_SERVER can be no socket."""
    path = socket_path()
    if not is_safe(path):
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(os.fspath(path))
        if peer_is_user(connection):
            found = Connection(connection)
            if found.greeting.agreed or any_version:
                return found
            _log.debug("the server (process %d) is of another version or environment", found.greeting.pid)
    except (OSError, KeyError, TypeError, ValueError) as error:
        _log.debug("no server answers at %s (%s)", path, error)
    connection.close()
    return None


def start_server(keep: float) -> Connection | None:
    """Leave a server behind that ends once it had nothing to do for so long, and connect to it; None where that does
    not come about in time."""
    command = [sys.executable, "-m", "ldmcli", "serve", "--idle", f"{keep:g}s"]
    null = os.open(os.devnull, os.O_RDWR)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, null, number) for number in range(3)]
        # What was given for this command is not for the server; what it agrees on with clients stays.
        environ = {name: value for name, value in os.environ.items() if not _is_option(name)}
        pid = os.posix_spawn(sys.executable, command, environ, file_actions=actions, setsid=True)
    finally:
        os.close(null)
    until = time.monotonic() + _STARTING_S
    while time.monotonic() < until:
        if found := connect():
            return found
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0]:
                return connect()  # another was faster
        time.sleep(_POLL_S)
    return None


def _is_option(name: str) -> bool:
    return name.startswith("LDM_") and name not in ("LDM_MODELS", "LDM_SERVER")


def find_server(*, wanted: bool, keep: float | None) -> Connection | None:
    """A connection to the server that a command is to use, if any; where it says to `keep` one, that is started."""
    if not wanted:
        return None
    return connect() or (start_server(keep) if keep else None)


def open_session(
    model: ModelSpec,
    runtime: RuntimeSpec,
    connection: Connection | None,
    *,
    encoding: Encoding = Encoding(),
    metadata: bool = True,
    exact: bool = False,
) -> "Session | RemoteSession":
    """The session to draw with: the server's at the other end of `connection`, or one of this process. Raises as
    Session does."""

    def here() -> "Session":
        from ldmcli.session import Session

        return Session(model, runtime, exact=exact)

    if connection is None:
        return here()
    remote = RemoteSession(connection, here, runtime, encoding, metadata=metadata)
    remote.open(model)
    return remote.here or remote


@dataclasses.dataclass(frozen=True)
class RemoteProgress:
    """How far pictures are that a server draws together, as `session.Progress` but for the latents."""

    requests: Sequence[FittedRequest]
    done: int
    steps: int


class RemotePicture:
    """A picture that came from the server as the bytes of its file; or what kept it from that."""

    failed = False

    def __init__(self, request: FittedRequest, message: dict[str, Any]) -> None:
        self.request = request
        self.seconds = float(message.get("seconds", 0.0))
        self._message = message

    def pixels(self) -> None:
        """Raises LdmError where the picture cannot be drawn. The pixels are in the file."""
        if self._message.get("of") == "pixels":
            raise error_from_dict(self._message["failure"])

    @property
    def data(self) -> bytes:
        """The bytes of its file. Raises as `Session.encode` does."""
        self.pixels()
        if "failure" in self._message:
            failure = self._message["failure"]
            raise ValueError(failure["message"]) if failure["class"] == "ValueError" else error_from_dict(failure)
        data = self._message["data"]
        assert isinstance(data, bytes)
        return data


class RemoteSession:
    """A `Session` of which a server holds the model; its pictures come as bytes of their files. Where the server
    refuses or is gone, this process goes on by itself, with its own words and errors."""

    def __init__(
        self,
        connection: Connection,
        open_here: "Callable[[], Session]",
        runtime: RuntimeSpec,
        encoding: Encoding,
        *,
        metadata: bool,
    ) -> None:
        self._connection, self._open_here = connection, open_here
        self.here: Session | None = None  # what draws since the server does not
        self.stopwatch = Stopwatch()
        self._runtime_spec, self._encoding, self._metadata = runtime, encoding, metadata
        self._facts: dict[str, Any] = {}
        self._identity: dict[str, Any] = {}  # comes with pictures

    @property
    def remote(self) -> bool:
        """Whether a server draws."""
        return self.here is None

    @property
    def runtime_spec(self) -> RuntimeSpec:
        """Where and how it was asked to compute."""
        return self._runtime_spec

    @property
    def undecided(self) -> bool:
        """A server finds out by itself how a model was trained."""
        return self.here is not None and self.here.undecided

    @property
    def name(self) -> str:
        """As of a Session, and so are the others."""
        return self._local("name") if self.here else str(self._facts["name"])

    @property
    def spec(self) -> ModelSpec:
        return self._home().spec

    @property
    def token_limit(self) -> int:
        return self._local("token_limit") if self.here else int(self._facts["token_limit"])

    @property
    def runtime(self) -> Any:
        return self._ask("runtime", lambda session: session.runtime)

    def open(self, model: ModelSpec) -> None:
        """Have the server look at the model. A name of the hub is looked up, and maybe fetched, here."""
        names = (model.model, model.vae, model.refiner, model.lora_dir, model.embedding_dir, model.upscaler)
        if any(map(is_of_process, names)):
            self._come_home(None)
            return
        fetched = {name: _fetched(name, self._runtime_spec) for name in names[:3] if name and _is_of_hub(name)}
        where, runtime = os.getcwd(), self._runtime_spec
        self._facts = self._ask("open", lambda session: {}, cwd=where, model=model, runtime=runtime, fetched=fetched)

    def fit(self, request: GenerationRequest) -> FittedRequest:
        paths = [request.image, request.mask, request.hires_upscaler, *request.embeddings]
        if any(map(is_of_process, [*paths, *(lora.path or lora.name for lora in request.loras)])):
            self._come_home(None)
        return self._ask(
            "fit",
            lambda session: session.fit(request),
            lambda fitted: fitted_from_dict(with_bytes(fitted, request)),
            request=request,
        )

    def cut_text(self, text: str, request: FittedRequest) -> str:
        return self._ask("cut_text", lambda session: session.cut_text(text, request), text=text, request=request)

    def embeddings(self, request: FittedRequest, *, named: bool = False) -> list[dict[str, str]]:
        def here(session: "Session") -> list[dict[str, str]]:
            return session.embeddings(request, named=named)

        return self._ask("embeddings", here, request=request, named=named)

    def identity(self) -> dict[str, Any]:
        return self.here.identity() if self.here else self._identity

    def begin_hashing(self) -> "Future[str] | None":
        return self.here.begin_hashing() if self.here else None

    def prepare_encoding(self) -> None:
        if self.here:
            self.here.prepare_encoding()

    def load(self, first: Sequence[FittedRequest] = ()) -> None:
        self._ask("load", lambda session: session.load(first), first=list(first))

    def encode(self, picture: "Picture | RemotePicture", encoding: Encoding, *, metadata: bool = True) -> bytes:
        if isinstance(picture, RemotePicture):
            return picture.data
        return self._home().encode(picture, encoding, metadata=metadata)

    def close(self) -> None:
        self._connection.close()
        if self.here:
            self.here.close()

    def draw(
        self,
        requests: Iterable[FittedRequest],
        *,
        batch_size: int = 1,
        on_step: Callable[[Any], object] | None = None,
    ) -> Iterator[Any]:
        waiting = iter(requests)
        while batch := list(itertools.islice(waiting, batch_size)):
            came: list[RemotePicture] = []
            if self.here is None:
                try:
                    self._drawn(batch, on_step, came)
                except (OSError, RefusedError) as error:
                    self._come_home(error)
            yield from came
            if len(came) < len(batch):  # drawn as it would have been, so that it is the same
                drawn = self._home().draw(batch, batch_size=batch_size, on_step=on_step)
                yield from itertools.islice(drawn, len(came), None)

    def _drawn(
        self, batch: list[FittedRequest], on_step: Callable[[Any], object] | None, came: list[RemotePicture]
    ) -> None:
        first = 0  # of those that are drawn together just now

        def on_event(message: dict[str, Any]) -> None:
            nonlocal first
            if message["event"] == "picture":
                for name, seconds in message.get("phases", {}).items():
                    self.stopwatch.add(name, seconds)
                self._identity = message["identity"]
                came.append(RemotePicture(batch[len(came)], message))
                return
            done, steps, count = message["done"], message["steps"], message["count"]
            self.stopwatch.mark("first_step" if done else "ready")
            if on_step:
                on_step(RemoteProgress(batch[first : first + count], done, steps))
            first += count if done == steps else 0

        encoding = dataclasses.asdict(self._encoding)
        self._connection.call("draw", on_event=on_event, requests=batch, encoding=encoding, metadata=self._metadata)

    def _ask(
        self,
        name: str,
        here: "Callable[[Session], _Result]",
        read: Callable[[Any], _Result] = lambda reply: reply,
        **arguments: Any,
    ) -> _Result:
        """What the server answers, or what a session here does."""
        if self.here is None:
            try:
                return read(self._connection.call(name, **arguments))
            except (OSError, RefusedError) as error:
                self._come_home(error)
        return here(self._home())

    def _local(self, name: str) -> Any:
        return getattr(self.here, name)

    def _home(self) -> "Session":
        self._come_home(None)
        assert self.here is not None
        return self.here

    def _come_home(self, error: Exception | None) -> None:
        """Go on in this process."""
        if self.here is not None:
            return
        if isinstance(error, OSError) and self._facts:
            _log.warning("the server is gone; going on without it")
        elif error is not None:
            _log.debug("the server does not do it (%s); this process does", error)
        from ldmcli.speed.startup import quicken

        self._connection.leave()
        quicken()
        self.here = self._open_here()
        self.here.stopwatch = self.stopwatch


class _Repeats(logging.Filter):
    """Leaves out what was said before by a server."""

    def __init__(self, heard: collections.Counter[str]) -> None:
        super().__init__()
        self._heard = heard

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        self._heard[text] -= 1
        return self._heard[text] < 0


def is_of_process(path: str | bytes | None) -> bool:
    """Whether a path may name something else, or nothing, in another process."""
    if not isinstance(path, str):
        return False
    return os.path.realpath(os.path.expanduser(path)).startswith(_OF_PROCESSES)


def _is_of_hub(name: str) -> bool:
    return "/" in name and not os.path.lexists(os.path.expanduser(name))


def _fetched(name: str, runtime: RuntimeSpec) -> str:
    from ldmcli.hub.listing import find_model

    return os.path.abspath(find_model(name, half=runtime.dtype != "fp32"))
