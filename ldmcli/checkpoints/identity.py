"""What identifies a model: the SHA-256 of its weights. Reads them all, unless remembered, without torch."""

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from ldmcli.background import in_background
from ldmcli.checkpoints.source import ModelSource
from ldmcli.disk.cache import EntryStore
from ldmcli.disk.opening import open_regular
from ldmcli.errors import printable

_log = logging.getLogger(__name__)
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Clocks of file systems tick as seldom as every 2 s (FAT): a file changed twice in a tick looks unchanged.
_TICK_NS = 3_000_000_000


class FileHashes:
    """SHA-256 of weight files, each computed once for all who ask, and remembered in `entries` from run to run while
    the file is the same by its real path, device, inode, size and times, as git's index does."""

    def __init__(self, entries: EntryStore | None = None) -> None:
        self.may_read = threading.Event()  # until then nothing is hashed that is not remembered
        self.may_read.set()
        self._entries = entries
        self._lock = threading.Lock()
        self._asked: dict[tuple[str, tuple[int, ...]], Future[str]] = {}

    def remembered(self, path: Path) -> str | None:
        """The file's hash where it is known without reading the file."""
        try:
            real = os.path.realpath(path)
            stamp = _stamp(os.stat(real))
        except OSError:
            return None
        with self._lock:
            future = self._asked.get((real, stamp))
        if future is not None and future.done() and not future.exception():
            return future.result()
        payload = self._entries.read(_entry_name(real)) if self._entries else None
        return _sha256_of(payload, stamp) if payload else None

    def sha256(self, path: Path) -> str:
        """The SHA-256 of the file's bytes, in hex. Raises what open_weights raises for no readable file."""
        known = self.remembered(path)
        if known:
            return known
        self.may_read.wait()
        real = os.path.realpath(path)
        with open_regular(path) as file:
            before = os.fstat(file.fileno())
            key = real, _stamp(before)
            with self._lock:
                future = self._asked.get(key)
                first = future is None
                if future is None:
                    future = self._asked[key] = Future()
            if not first:
                return future.result()
            started_ns = time.time_ns()
            try:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            except BaseException as error:
                with self._lock:
                    del self._asked[key]
                future.set_exception(error)
                raise
            future.set_result(found)
            unchanged = _stamp(os.fstat(file.fileno())) == key[1]
        settled = max(before.st_mtime_ns, before.st_ctime_ns) < started_ns - _TICK_NS
        if self._entries and unchanged and settled:
            text = json.dumps({"stamp": key[1], "sha256": found})
            self._entries.write(_entry_name(real), text.encode())
        return found


def model_sha256(source: ModelSource, hashes: FileHashes | None = None) -> "Future[str]":
    """The model's identity, found in a thread beside the sampling: the SHA-256 of its file; for a folder, that of the
    list of its weight files' hashes."""
    known_hashes = hashes or FileHashes()
    return _when_free(source, source.weight_paths(), known_hashes)


def part_sha256(source: ModelSource, part: str, hashes: FileHashes) -> "Future[str]":
    """The identity of the weights of one of the source's parts, as model_sha256 tells that of them all; of a single
    file it is the file's. Done at once where `hashes` has them: only headers are read then.

    Raises what open_weights raises.
    """
    paths = sorted({file.path for file in source.files(part)})
    known = _sha256(source, paths, hashes.remembered)
    if known is None:
        return _when_free(source, paths, hashes)
    future: Future[str] = Future()
    future.set_result(known)
    return future


def _sha256(source: ModelSource, paths: Sequence[Path], sha256: Callable[[Path], str | None]) -> str | None:
    """The identity of weight files, by what tells the hash of one; None where that does not know one."""
    found = [sha256(path) for path in paths]
    if source.single_file:
        return found[0]
    if None in found:
        return None
    named = zip(found, (path.relative_to(source.path).as_posix() for path in paths), strict=True)
    return hashlib.sha256("".join(f"{one}  {name}\n" for one, name in named).encode()).hexdigest()


def _when_free(source: ModelSource, paths: Sequence[Path], hashes: FileHashes) -> "Future[str]":
    """The identity of weight files, hashed in a thread that takes the processor only where nothing else wants it."""

    def work() -> str:
        with contextlib.suppress(OSError):  # a thread of Linux has a priority of its own; a sandbox may refuse
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        found = _sha256(source, paths, hashes.sha256)
        assert found is not None
        return found

    return in_background(work, "sha256")


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _entry_name(real: str) -> str:
    return hashlib.sha256(os.fsencode(real)).hexdigest()


def _sha256_of(payload: bytes, stamp: tuple[int, ...]) -> str | None:
    """The hash that an entry tells of a file with this stamp."""
    try:
        told = json.loads(payload)
        found = told["sha256"] if told["stamp"] == list(stamp) else None
    except (ValueError, RecursionError, KeyError, TypeError):
        _log.debug("cache: an entry is not a hash: %s", printable(repr(payload[:100])))
        return None
    return found if isinstance(found, str) and _SHA256.fullmatch(found) else None
