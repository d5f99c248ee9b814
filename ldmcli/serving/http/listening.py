"""The HTTP server: uvicorn in a thread of its own, with an end to waiting for clients that send or read nothing."""

import asyncio
import contextlib
import logging
import socket
import threading
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ldmcli.errors import CannotCreateError, UsageError, printable
from ldmcli.serving.http.app import make_app
from ldmcli.serving.http.calls import Calls
from ldmcli.serving.http.gate import Gate, is_loopback

_HEAD_S = 10.0  # in which a request's head must be there; bodies have their own time
_UNREAD_S = 60.0  # after which a client that reads nothing of its answer is given up
_LOOK_S = 1.0
_MAX_CONNECTIONS, _MAX_OPEN = 512, 768  # from where on requests are answered 503, and connections closed
_MAX_HEAD = 16 << 10  # bytes
_CLOSE_S = 1  # for answers under way when the server ends
_log = logging.getLogger(__name__)


def parse_address(text: str, apart: str | None = None) -> tuple[str, int]:
    """Host and port of [HOST:]PORT; the host may be given `apart`. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if colon and apart:
        raise UsageError("--host and --http both name a host; leave out one of them.")
    host = host.removeprefix("[").removesuffix("]") if colon else apart or "127.0.0.1"
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--http {printable(repr(text))} is not [HOST:]PORT, such as 7860 or 127.0.0.1:7860.")
    return host, int(port)


def check_token(host: str, token: str | None) -> None:
    """Raises UsageError where others reach the server and need no token, or where it is no token."""
    if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token):
        raise UsageError("the token must be 8 or more printable ASCII characters without spaces.")
    if token is None and not is_loopback(host):
        raise UsageError(f"--http {printable(host)} lets other machines in; give a --token, or LDM_TOKEN.")


class HttpServer:
    """Listens from the beginning, and answers from `start` to `close`. Raises CannotCreateError where the address is
    taken or not this machine's."""

    def __init__(self, calls: Calls, host: str, port: int, token: str | None = None) -> None:
        check_token(host, token)
        self._calls = calls
        self._socket = _bound(host, port)
        config = uvicorn.Config(
            make_app(calls, Gate(host, token)),
            http=_Timely,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MAX_CONNECTIONS,
            h11_max_incomplete_event_size=_MAX_HEAD,
            timeout_graceful_shutdown=_CLOSE_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="http", daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def start(self) -> None:
        """Answer."""
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # which tells of what clients do wrong
        self._thread.start()

    def close(self) -> None:
        """End, with the answers under way or without them."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(2 * _CLOSE_S)
        self._calls.close()
        self._socket.close()


class _Timely(H11Protocol):
    """uvicorn's protocol, which waits for ever for a request's head, and for a client to read what it was sent."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._since = self._moved = self.loop.time()
        self._seen, self._unread = self.cycle, 0
        self._timer: asyncio.TimerHandle = self.loop.call_later(_LOOK_S, self._look)
        if len(self.connections) > _MAX_OPEN:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Give the client up when its time is over."""
        now, unread = self.loop.time(), self.transport.get_write_buffer_size()
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy or self.cycle is not self._seen:
            self._seen, self._since = self.cycle, now
        if unread == 0 or unread != self._unread:
            self._unread, self._moved = unread, now
        if now - self._moved > _UNREAD_S or (not busy and not unread and now - self._since > _HEAD_S):
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(_LOOK_S, self._look)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family)
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
            found.listen(256)
        except OSError:
            found.close()
            raise
    except OSError as error:
        reason = printable(error.strerror or str(error)).lower()
        raise CannotCreateError(f"the server cannot listen at {printable(host)}:{port}: {reason}.") from None
    found.set_inheritable(False)
    return found
