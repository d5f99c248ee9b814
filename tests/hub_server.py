"""A model hub on loopback: as much of the Hugging Face hub's protocol as is asked for, and faults on order."""

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_LARGE = 100_000  # bytes; from here on a file is stored apart, as git-lfs does, and served by another host


@dataclasses.dataclass(frozen=True)
class Request:
    """One request as it arrived. `host` is the name by which the server was called."""

    method: str
    path: str
    host: str
    begin: int
    token: str


@dataclasses.dataclass
class Repository:
    """Commits by name, branches and tags, and who may read. `files` maps paths to content."""

    files: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    token: str = ""  # needed to see that there is such a repository
    gated: bool = False


class Hub:
    """The hub's state and what was asked of it. Change it while no request runs."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.blobs: dict[str, bytes] = {}
        self.cuts: list[int] = []  # the next large files end after so many bytes, one each
        self.stall: int | None = None  # large files stop after so many bytes, and the line stays open
        self.corrupt = False
        self.web_page = False
        self.resumed = threading.Event()
        self.port = 0

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, source: Path | dict[str, bytes], branch: str = "main") -> str:
        """Commit a folder or these files to a repository's branch; returns the commit."""
        if isinstance(source, Path):
            source = {str(p.relative_to(source)): p.read_bytes() for p in sorted(source.rglob("*")) if p.is_file()}
        digest = hashlib.sha1(json.dumps([(path, _sha256(data)) for path, data in source.items()]).encode())
        repository = self.repositories.setdefault(name, Repository())
        repository.files[digest.hexdigest()] = source
        repository.refs[branch] = digest.hexdigest()
        self.blobs |= {_sha256(data): data for data in source.values() if len(data) >= _LARGE}
        return digest.hexdigest()

    def took(self, method: str = "GET") -> list[str]:
        """The files that were asked for with `method`, in order; those stored apart by their name on the hub."""
        paths = [request.path.split("/resolve/")[1] for request in self.requests
                 if request.method == method and "/resolve/" in request.path]  # fmt: skip
        return [path.partition("/")[2] for path in paths]

    @contextlib.contextmanager
    def running(self) -> Iterator["Hub"]:
        """Serve until the block ends."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self.resumed.set()
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        given = self.headers.get("Range", "bytes=0-")
        begin = int(given.removeprefix("bytes=").partition("-")[0])
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        host = self.headers.get("Host", "").partition(":")[0]
        self.hub.requests.append(Request(self.command, path, host, begin, token))
        words = path.split("/")
        if self.hub.web_page:
            self._answer(200, b"<html>Welcome to the hotel's network</html>", {"Content-Type": "text/html"})
        elif words[0] == "blobs":
            self._large(self.hub.blobs[words[1]], begin)
        elif words[:2] == ["api", "models"]:
            self._about("/".join(words[2:4]), "/".join(words[5:]) or "main", token)
        elif len(words) > 4 and words[2] == "resolve":
            self._file("/".join(words[:2]), words[3], "/".join(words[4:]), token)
        else:
            self._refuse(404, "", "Not found")

    def _about(self, name: str, revision: str, token: str) -> None:
        repository, commit = self._commit(name, revision, token)
        if repository is None:
            return
        siblings = []
        for path, data in repository.files[commit].items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if len(data) >= _LARGE:
                entry["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        about = {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": bool(repository.token),
                 "gated": repository.gated, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip
        self._answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, path: str, token: str) -> None:
        repository, commit = self._commit(name, revision, token)
        if repository is None:
            return
        data = repository.files[commit].get(path)
        if repository.gated and token != repository.token:
            self._refuse(401 if not token else 403, "GatedRepo", f"Access to model {name} is restricted.")
        elif data is None:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        elif len(data) >= _LARGE:
            sha = _sha256(data)
            apart = {"Location": f"http://localhost:{self.hub.port}/blobs/{sha}", "X-Linked-Size": str(len(data))}
            self._answer(302, b"", apart | {"X-Repo-Commit": commit, "X-Linked-ETag": f'"{sha}"'})
        else:
            self._answer(200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def _commit(self, name: str, revision: str, token: str) -> tuple[Repository | None, str]:
        """The repository and the commit that `revision` is; None after a refusal."""
        repository = self.hub.repositories.get(name)
        if token == "outdated":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.token and not repository.gated and token != repository.token):
            # The hub does not tell strangers what is private and what is not there.
            self._refuse(*((404, "RepoNotFound", "Repository not found") if token else (401, "", "Invalid username")))
        elif revision not in repository.refs and revision not in repository.files:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository, repository.refs.get(revision, revision)
        return None, ""

    def _large(self, data: bytes, begin: int) -> None:
        """A file that is stored apart, with the faults that were ordered."""
        rest = data[begin:]
        headers = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
        sent = self.hub.cuts.pop(0) if self.hub.cuts else len(rest) if self.hub.stall is None else self.hub.stall
        if self.hub.corrupt:
            rest = bytes(len(rest))
        self._head(206 if begin else 200, headers | {"Content-Length": str(len(rest))})
        with contextlib.suppress(ConnectionError):  # the client may have been killed
            self.wfile.write(rest[:sent])
            if self.hub.stall is not None:
                self.hub.resumed.wait(60)
        self.close_connection = sent < len(rest)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._answer(status, body, named | {"X-Error-Message": message} | (headers or {}))

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, headers | {"Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
