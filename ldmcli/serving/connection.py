"""The way to the server of this user: found, checked, or started."""

import collections
import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ldmcli.errors import printable
from ldmcli.frozen import frozen
from ldmcli.serving.place import agreement, is_safe, peer_is_user, socket_path
from ldmcli.serving.wire import receive, send

_GREETING_S = 10.0  # that a server has to answer a greeting
_STARTING_S = 30.0  # … to start
_POLL_S = 0.02
_log = logging.getLogger(__name__)


class GoneError(Exception):
    """The server is gone."""


class RefusedError(Exception):
    """The server will not or cannot do it; why, its text says."""


@frozen
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
        """Have the server do something, and wait; `on_event` hears what it tells meanwhile. Raises RefusedError and
        GoneError."""
        with self._calling:
            with _gone_named():
                send(self._socket, {"call": name, **arguments})
            while True:
                with _gone_named():
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


@contextlib.contextmanager
def _gone_named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GoneError(str(error)) from None


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
    except TimeoutError:
        _log.warning("the server at %s does not answer", printable(str(path)))
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


class _Repeats(logging.Filter):
    """Leaves out what was said before by a server."""

    def __init__(self, heard: collections.Counter[str]) -> None:
        super().__init__()
        self._heard = heard

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        self._heard[text] -= 1
        return self._heard[text] < 0
