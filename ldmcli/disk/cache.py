"""What may be forgotten at any time: small entries in the user's cache folder, each whole or not there.

Nothing here ever raises for what the disk or the folder is like; a run goes on without, and a debug line says so. A
folder that others own or can write to is left alone.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from ldmcli.errors import printable

_log = logging.getLogger(__name__)
_MAGIC = b"ldmcli-cache-1\n"
_HEAD = len(_MAGIC) + hashlib.sha256().digest_size
_NAME = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"\.ldm-[0-9]+-[0-9a-f]{16}\.part")
_STALE_S = 3600.0  # so old a temporary file is no process's any more
_CLOCKS_S = 60.0  # how far another machine's clock may be ahead
_WRITES_PER_SCAN = 64
_KEPT = 7 / 8  # of the limits, after a scan: room for the writes until the next


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where this program's cache is, there or not: $XDG_CACHE_HOME/ldmcli, or ~/.cache/ldmcli where that is unset or
    not absolute. None where there is no home either. Source: the XDG base directory specification."""
    base = environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        home = environ.get("HOME") if "HOME" in environ else os.path.expanduser("~")
        base = os.path.join(home, ".cache") if home else ""
    return Path(base, "ldmcli") if os.path.isabs(base) else None


@dataclasses.dataclass(frozen=True)
class Cache:
    """The stores of the cache: what text encoders made of prompts, and hashes of weight files."""

    prompts: "EntryStore"
    hashes: "EntryStore"


def open_cache(*, enabled: bool = True) -> Cache:
    """The user's cache; neither looked at nor made yet. One that is not `enabled` holds and keeps nothing."""
    folder = cache_folder() if enabled else None
    return Cache(
        EntryStore(folder and folder / "prompts", max_bytes=256 << 20),
        EntryStore(folder and folder / "hashes", max_bytes=1 << 20, max_entries=1000),
    )


class EntryStore:
    """Bytes by name, a file each; `folder` is made, with its parent, at the first write. The entries used last are
    kept: `max_bytes` and `max_entries` of them, give or take what is written between two scans.

    Threads and processes may use one folder at once. A folder of None holds and keeps nothing.
    """

    def __init__(self, folder: Path | None, *, max_bytes: int, max_entries: int = 100_000) -> None:
        self._folder = folder
        self._max_bytes, self._max_entries = max_bytes, max_entries
        self._largest = max_bytes // 16  # bytes in one entry
        self._writes = 0
        self._lock = threading.Lock()

    @property
    def enabled(self) -> bool:
        """Whether it may hold or keep anything, as far as is known."""
        return self._folder is not None

    def read(self, name: str) -> bytes | None:
        """The entry `name`, 64 hex digits; None where there is none. A damaged one is removed."""
        folder = self._folder
        if folder is None:
            return None
        path = _path(folder, name)
        try:
            _check_private(folder)
            with open(path, "rb", buffering=0, opener=_unfollowed) as file:
                payload = self._payload(file)
                if payload is not None:
                    with contextlib.suppress(OSError):
                        os.utime(file.fileno())  # used: the last to be dropped
        except FileNotFoundError:
            return None
        except OSError as error:
            if not isinstance(error, IsADirectoryError) and not os.path.islink(path):
                self._give_up(error)
                return None
            payload = None
        if payload is None:
            self.remove(name)
        return payload

    def write(self, name: str, payload: bytes) -> None:
        """Keep `payload` as the entry `name`, in place of what it was."""
        folder = self._folder
        if folder is None or len(payload) > self._largest:
            return
        path = _path(folder, name)
        temporary = folder / f".ldm-{os.getpid()}-{secrets.token_hex(8)}.part"
        try:
            self._make(folder)
            try:
                # Not synced: what a power cut leaves unfinished fails its checksum.
                with open(temporary, "xb", opener=_private) as file:
                    file.write(_MAGIC + hashlib.sha256(payload).digest())
                    file.write(payload)
                os.replace(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            self._count_write(folder)
        except IsADirectoryError:
            _log.debug("cache: %s is a folder, not an entry", printable(str(path)))
        except OSError as error:
            self._give_up(error)

    def remove(self, name: str) -> None:
        """Forget the entry `name`, which is not what it should be."""
        if self._folder is None:
            return
        path = _path(self._folder, name)
        _log.debug("cache: removing %s, which is no entry", printable(str(path)))
        with contextlib.suppress(OSError):
            path.unlink()

    def _payload(self, file: io.FileIO) -> bytes | None:
        """The payload of an open file; None where it is no entry."""
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or not _HEAD <= status.st_size <= _HEAD + self._largest:
            return None
        raw = bytearray(status.st_size)
        got = file.readinto(raw)
        payload = bytes(memoryview(raw)[_HEAD:])
        whole = got == len(raw) and raw[:_HEAD] == _MAGIC + hashlib.sha256(payload).digest()
        return payload if whole else None

    def _make(self, folder: Path) -> None:
        """See that the folder and its parent are there and no one else's. Raises OSError."""
        if not os.path.isdir(folder.parent):
            _check_home(folder.parent)
            # The specification wants folders that it makes at 0700.
            for missing in reversed([p for p in folder.parents if not os.path.isdir(p)]):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(missing, 0o700)
        _check_ours(folder.parent, os.stat(folder.parent))
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        _check_private(folder)

    def _give_up(self, error: OSError) -> None:
        """Go without from now on, after one line."""
        folder, self._folder = self._folder, None
        if folder is not None:
            _log.debug("cache: %s goes unused: %s", printable(str(folder)), printable(str(error)))

    def _count_write(self, folder: Path) -> None:
        with self._lock:
            due = self._writes % _WRITES_PER_SCAN == 0
            self._writes += 1
        if due:
            self._prune(folder)

    def _prune(self, folder: Path) -> None:
        """Drop what was used least lately beyond the limits, and what dead processes left. Other files stay."""
        now = time.time()
        entries: list[tuple[float, int, str]] = []
        with os.scandir(folder) as found:
            for entry in found:
                with contextlib.suppress(FileNotFoundError):  # another process prunes too
                    status = entry.stat(follow_symlinks=False)
                    if _PART.fullmatch(entry.name) and abs(now - status.st_mtime) > _STALE_S:
                        os.unlink(entry.path)
                    elif _NAME.fullmatch(entry.name) and not stat.S_ISDIR(status.st_mode):
                        used = status.st_mtime if status.st_mtime <= now + _CLOCKS_S else 0.0
                        entries.append((used, status.st_size, entry.path))
        count, size = len(entries), sum(size for _, size, _ in entries)
        for _, bytes_, path in sorted(entries):
            if count <= self._max_entries * _KEPT and size <= self._max_bytes * _KEPT:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            count, size = count - 1, size - bytes_


def _path(folder: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no entry's name")
    return folder / name


def _unfollowed(path: str, flags: int) -> int:
    """Opens a file; a link is not followed, a pipe not waited for."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _check_private(folder: Path) -> None:
    """Raises OSError where others could have put something into a store's folder. Its parent may be a link, to another
    disk say."""
    _check_ours(folder.parent, os.stat(folder.parent))
    _check_ours(folder, os.lstat(folder))


def _check_ours(folder: Path, status: os.stat_result) -> None:
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EACCES, "others own it or can write to it", str(folder))


def _check_home(folder: Path) -> None:
    """Raises OSError where root, in another user's home, would make folders that the user cannot write to."""
    existing = next(p for p in folder.parents if os.path.isdir(p))
    if os.geteuid() == 0 and os.stat(existing).st_uid != 0:
        raise PermissionError(errno.EPERM, "it is another user's", str(existing))
