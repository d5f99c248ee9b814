"""What identifies a model: the SHA-256 of its weights. Reads them all, unless remembered, without torch."""

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
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
    """SHA-256 of weight files, remembered in `entries` from run to run while a file is the same by its real path,
    device, inode, size and times, as git's index does."""

    def __init__(self, entries: EntryStore | None = None) -> None:
        self._entries = entries

    def remembered(self, path: Path) -> str | None:
        """The file's hash where it is known without reading the file."""
        try:
            real = os.path.realpath(path)
            stamp = _stamp(os.stat(real))
        except OSError:
            return None
        payload = self._entries.read(_entry_name(real)) if self._entries else None
        return _sha256_of(payload, stamp) if payload else None

    def sha256(self, path: Path) -> str:
        """The SHA-256 of the file's bytes, in hex. Raises what open_weights raises for no readable file."""
        known = self.remembered(path)
        if known:
            return known
        started_ns = time.time_ns()
        with open_regular(path) as file:
            before = os.fstat(file.fileno())
            found = hashlib.file_digest(file, "sha256").hexdigest()
            unchanged = _stamp(os.fstat(file.fileno())) == _stamp(before)
        settled = max(before.st_mtime_ns, before.st_ctime_ns) < started_ns - _TICK_NS
        if self._entries and unchanged and settled:
            text = json.dumps({"stamp": _stamp(before), "sha256": found})
            self._entries.write(_entry_name(os.path.realpath(path)), text.encode())
        return found


def model_sha256(source: ModelSource, hashes: FileHashes | None = None) -> "Future[str]":
    """The model's identity: the SHA-256 of its file; for a folder, that of the list of its weight files' hashes. It is
    found in a thread that takes the processor only where nothing else wants it."""
    sha256 = (hashes or FileHashes()).sha256

    def work() -> str:
        with contextlib.suppress(OSError):  # a thread of Linux has a priority of its own; a sandbox may refuse
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        paths = source.weight_paths()
        if source.single_file:
            return sha256(paths[0])
        listed = "".join(f"{sha256(path)}  {path.relative_to(source.path).as_posix()}\n" for path in paths)
        return hashlib.sha256(listed.encode()).hexdigest()

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
