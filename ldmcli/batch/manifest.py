"""The manifest of a run: JSON lines that say of each picture how it came out; one file per worker, only appended to.

Each line reaches the disk before the next picture begins. A process killed at any instant leaves at most a torn last
line, which readers leave out and the next writer of the file cuts off.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import logging
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ldmcli.batch.fields import PROMPT
from ldmcli.batch.items import BadRow, Item, Outcome
from ldmcli.batch.pictures import PICTURE_PATH
from ldmcli.disk.opening import open_regular, shown
from ldmcli.disk.writing import make_folder, named_errors, sync_folder
from ldmcli.errors import BadDataError, CannotCreateError
from ldmcli.spec import GenerationRequest

DONE, FAILED = "done", "failed"
STATES = {DONE: 1, FAILED: 0}
State = tuple[int, int, int, int, str]  # number, row, one of STATES, pictures of the row, key
_FOLDER = "manifest"
_MOVE_OUT = "move it out of the folder"
_KEY = re.compile(r"[0-9a-f]{16}", re.ASCII)
_MAX_LINE = 1 << 26  # two texts of a request escaped in full take 12 MiB
_MAX_ERROR = 10_000
_BLOCK = 1 << 16
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(GenerationRequest)}
_encode_sorted = json.JSONEncoder(sort_keys=True, default=lambda lora: lora.what).encode
# Lines begin and end so that a million of them are read in seconds: the ledger needs no more than the beginning, which
# the CRC-32 at the end vouches for. Others, such as another program's rewriting, are parsed in full.
_HEAD = re.compile(
    rb'\{"row": (\d{1,18}), "number": (\d{1,18}), "status": "(done|failed)", "key": "([0-9a-f]{16})", '
    rb'"pictures": (\d{1,9}), '
)
_CHECK = b', "check": "%08x"}\n'
_CHECK_LENGTH = len(_CHECK % 0)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def key_of(item: Item) -> str:
    """16 hex digits that differ for every two recipes or ids of pictures.

    What a request does not say of itself is left out, so that a field added to requests one day changes no key.
    """
    said = {name: value for name, value in vars(item.request).items() if value != _DEFAULTS[name]}
    text = _encode_sorted([item.row, item.id, said])
    return hashlib.blake2b(text.encode("ascii"), digest_size=8).hexdigest()


class ManifestWriter:
    """Appends to the file of one worker, which no other process may write at the time. Close it, or use `with`.

    Raises CannotCreateError where the file cannot be made, StorageError where the disk is full or fails.
    """

    def __init__(self, folder: Path, worker: str) -> None:
        self.worker = worker
        self.path = folder / _FOLDER / f"{worker}.jsonl"
        make_folder(self.path.parent)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        with named_errors(self.path, "open"):
            self._descriptor = os.open(self.path, flags, 0o666)
            try:
                if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                    raise CannotCreateError(f"{shown(self.path)} is not a regular file and is not written to.")
                _drop_torn_line(self._descriptor)
                sync_folder(self.path.parent)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "ManifestWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; twice does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1  # a plan that still waits for its input must not write to what gets this number

    def append(self, outcome: Outcome) -> None:
        """Add the line of one picture; it is on the disk when this returns. The picture must be there by then."""
        item = outcome.item
        record: dict[str, Any] = {"row": item.row, "number": item.number, "status": outcome.status}
        record |= {"key": key_of(item), "pictures": item.pictures}
        record |= {"id": item.id, "line": item.line, "seed": item.request.seed}
        if outcome.status == DONE:
            record |= {"path": outcome.path, "sha256": outcome.sha256}
        else:
            record |= {"error": outcome.error[:_MAX_ERROR], "code": outcome.code}
        record |= {"attempts": outcome.attempts, "seconds": round(outcome.seconds, 3)}
        record |= {"worker": outcome.worker or self.worker, "time": _now()}
        self._write(record | {"request": item.request.to_dict(), "extra": dict(item.extra)})

    def append_bad(self, bad: BadRow) -> None:
        """Add the line of a row that cannot be drawn: it has no number, and the code of bad data."""
        error = " ".join(bad.problems)[:_MAX_ERROR]
        record = {"row": bad.row, "number": None, "status": FAILED, "id": bad.id, "line": bad.line, "error": error}
        record |= {"code": BadDataError.exit_code, "worker": self.worker, "time": _now()}
        self._write(record | ({"request": {PROMPT: bad.prompt}} if bad.prompt else {}))

    def _write(self, record: dict[str, Any]) -> None:
        line = _line(record)
        if len(line) > _MAX_LINE:  # only columns that the program does not read can be that long
            line = _line(record | {"extra": {}})
        with named_errors(self.path, "append to"):
            size = os.fstat(self._descriptor).st_size
            try:
                rest = memoryview(line)
                while rest:  # once, unless the disk is full: then the second call says why
                    rest = rest[os.write(self._descriptor, rest) :]
                os.fsync(self._descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, size)
                raise


def read_manifests(folder: Path) -> Iterator[dict[str, Any]]:
    """The sound lines of all manifests of the run in `folder`, file by file, one in memory at a time.

    Fields can be relied on as far as `_is_sound` looks at them. Damaged lines are counted and logged: their
    pictures count as not done. Raises StorageError where reading fails, MissingInputError where a file may not be read.
    """
    return _read(folder, _parsed)


def read_states(folder: Path) -> Iterator[State]:
    """What the ledger needs of the same lines, several times as fast. Raises as `read_manifests` does."""
    return _read(folder, _state)


class ManifestTail:
    """The sound lines that are added to the manifests of the run in `folder`, read without a lock beside their writers;
    at first the last ones of those that are there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read = {path: max(0, path.stat().st_size - _BLOCK) for path in self._paths()}

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines that came since the last call. Raises as `read_manifests` does."""
        for path in self._paths():
            with open_regular(path, ("", _MOVE_OUT)) as file:
                while lines := self._more(path, file):
                    yield from filter(None, map(_parsed, lines))

    def _paths(self) -> list[Path]:
        return sorted((self._folder / _FOLDER).glob("*.jsonl"))

    def _more(self, path: Path, file: io.FileIO) -> list[bytes]:
        """Some whole lines, none at the end; one that is too long is left out."""
        start = file.seek(self._read.get(path, 0))
        data = file.read(max(0, min(_MAX_LINE, os.fstat(file.fileno()).st_size - start)))
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) == _MAX_LINE:
            whole = len(data)
        self._read[path] = start + whole
        return data[:whole].splitlines()


def bad_state(row: int) -> State:
    """A row that cannot be drawn stands for one picture, whose number is the row's, negative, and its state too."""
    return -row, row, -1, 1, ""


def _read(folder: Path, parse: Callable[[bytes], _T | None]) -> Iterator[_T]:
    for path in sorted((folder / _FOLDER).glob("*.jsonl")):
        damaged = 0
        for line in _lines(path):
            parsed = parse(line)
            if parsed is None:
                damaged += 1
            else:
                yield parsed
        if damaged:
            _log.warning("%s: damaged lines left out: %d; their pictures are drawn again", shown(path), damaged)


def _lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a file, one that is too long as an empty one. What a kill tore, at the end, is no line."""
    with open_regular(path, ("", _MOVE_OUT)) as raw, io.BufferedReader(raw, 1 << 20) as file:
        while line := file.readline(_MAX_LINE):
            whole = len(line) < _MAX_LINE
            while line and not line.endswith(b"\n"):
                line = file.readline(_MAX_LINE)
            if line:
                yield line if whole else b""


def _line(record: dict[str, Any]) -> bytes:
    body = json.dumps(record).encode("ascii")[:-1]
    return body + _CHECK % zlib.crc32(body)


def _state(line: bytes) -> State | None:
    head = _HEAD.match(line)
    if head and line[-_CHECK_LENGTH:] == _CHECK % zlib.crc32(line[:-_CHECK_LENGTH]):
        row, number, status, key, pictures = head.groups()
        return int(number), int(row), STATES[status.decode()], int(pictures), key.decode()
    record = _parsed(line)
    return None if record is None else state_of(record)


def state_of(record: dict[str, Any]) -> State:
    """What the ledger needs of a line."""
    if record["number"] is None:
        return bad_state(record["row"])
    return record["number"], record["row"], STATES[record["status"]], record["pictures"], record["key"]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_sound(record) else None


def _is_sound(record: dict[str, Any]) -> bool:
    """Whether a line has what the ledger builds on: a failed row has no number; a picture has one and a key, and its
    path, if it is done, stays within the folder."""
    row, number, status = record.get("row"), record.get("number"), record.get("status")
    if not _is_count(row) or row == 0 or type(record.get("id")) is not str:
        return False
    if number is None:
        return status == FAILED and "key" not in record and "pictures" not in record
    if not (_is_count(number) and _matches(_KEY, record.get("key")) and _is_count(record.get("pictures"), 10**9)):
        return False
    return status == FAILED or (status == DONE and _matches(PICTURE_PATH, record.get("path")))


def _is_count(value: Any, end: int = 10**18) -> bool:
    return type(value) is int and 0 <= value < end


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return type(value) is str and pattern.fullmatch(value) is not None


def _drop_torn_line(descriptor: int) -> None:
    """Cut the file off after its last newline."""
    size = end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - _BLOCK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        end = start + newline + 1 if newline >= 0 else start
        if newline >= 0:
            break
    if end < size:
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
