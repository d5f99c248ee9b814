"""What the tests of the HTTP server share: a server in this process, and plain calls."""

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

from ldmcli import ModelSpec, RuntimeSpec
from ldmcli.serving.http.calls import Calls
from ldmcli.serving.http.listening import HttpServer
from ldmcli.serving.work import Work

RUNTIME = RuntimeSpec(device="cpu", dtype="fp32", threads=1)


@contextlib.contextmanager
def serving(
    model: Path, *, lora_dir: Path | None = None, token: str | None = None, host: str = "127.0.0.1"
) -> Iterator[str]:
    """The URL of a server in this process that has one model, which is read when it is first drawn with."""
    work = Work()
    spec = ModelSpec(str(model), lora_dir=lora_dir and str(lora_dir))
    server = HttpServer(Calls(work, {"tiny": spec}, RUNTIME), host, 0, token)
    server.start()
    try:
        yield server.url
    finally:
        work.close()
        server.close()


def call(
    url: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, method: str | None = None
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of a call; what is no bytes is sent as JSON, and JSON is read."""
    given = {"Content-Type": "application/json"} if body is not None else {}
    data = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    with contextlib.closing(connection):
        connection.request(method or ("GET" if body is None else "POST"), path, data, given | dict(headers or {}))
        response = connection.getresponse()
        text = response.read()
        is_json = response.getheader("content-type", "").startswith("application/json")
        return response.status, dict(response.getheaders()), json.loads(text) if is_json else text


def connected(url: str) -> socket.socket:
    """A connection that sends nothing of itself."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)
