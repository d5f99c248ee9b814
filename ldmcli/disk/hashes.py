"""SHA-256 of weight files, remembered from run to run in the user's cache.

What the cache is like never fails a run: it goes on without, and a debug line says so once.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import time
from pathlib import Path

from ldmcli.disk.cache import cache_folder, check_private, make_private
from ldmcli.disk.opening import open_regular
from ldmcli.disk.writing import write_exact
from ldmcli.errors import LdmError, printable

_log = logging.getLogger(__name__)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 1 << 12  # of an entry
_MAX_ENTRIES = 1000  # the last written are kept
# Clocks of file systems tick as seldom as every 2 s (FAT): a file changed twice in a tick looks unchanged.
_TICK_NS = 3_000_000_000


class FileHashes:
    """Hashes of files, remembered in `folder` while a file is the same by its real path, device, inode, size and times,
    as git's index does. Threads and processes may use one folder at once; with None nothing is remembered."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def remembered(self, path: Path) -> str | None:
        """The file's hash where it is known without reading the file."""
        try:
            real = os.path.realpath(path)
            stamp = _stamp(os.stat(real))
        except OSError:
            return None
        try:
            entry = json.loads(self._read(_entry_name(real)) or b"{}")
            found = entry["sha256"] if entry["stamp"] == list(stamp) else None
        except (ValueError, RecursionError, KeyError, TypeError):
            return None
        return found if isinstance(found, str) and _SHA256.fullmatch(found) else None

    def sha256(self, path: Path) -> str:
        """The SHA-256 of the file's bytes, in hex. Raises what `open_regular` raises."""
        known = self.remembered(path)
        if known:
            return known
        started_ns = time.time_ns()
        with open_regular(path) as file:
            before = os.fstat(file.fileno())
            found = hashlib.file_digest(file, "sha256").hexdigest()
            unchanged = _stamp(os.fstat(file.fileno())) == _stamp(before)
        settled = max(before.st_mtime_ns, before.st_ctime_ns) < started_ns - _TICK_NS
        if unchanged and settled:
            entry = json.dumps({"stamp": _stamp(before), "sha256": found}).encode()
            self._write(_entry_name(os.path.realpath(path)), entry)
        return found

    def _read(self, name: str) -> bytes | None:
        if self._folder is None:
            return None
        path = self._folder / name
        try:
            check_private(self._folder)
            return path.read_bytes() if path.is_file() and path.stat().st_size <= _MAX_BYTES else None
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up(error)
            return None

    def _write(self, name: str, entry: bytes) -> None:
        if self._folder is None:
            return
        try:
            make_private(self._folder)
            write_exact(self._folder / name, entry, overwrite=True)
            _drop_oldest(self._folder)
        except (OSError, LdmError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Go without from now on, after one line."""
        folder, self._folder = self._folder, None
        _log.debug("cache: %s goes unused: %s", printable(str(folder)), printable(str(error)))


def sha256_now(path: str) -> str:
    """The SHA-256 of a file as it is now, found once for each state of it. Raises what `open_regular` raises."""
    stamp = None
    with contextlib.suppress(OSError, ValueError):
        stamp = _stamp(os.stat(path))
    return _sha256(path, stamp)


@functools.lru_cache(4096)
def _sha256(path: str, stamp: object) -> str:
    return FileHashes().sha256(Path(path))


def user_hashes(*, enabled: bool = True) -> FileHashes:
    """Hashes in the user's cache folder, neither looked at nor made yet; not `enabled`, nothing is remembered."""
    folder = cache_folder() if enabled else None
    return FileHashes(folder and folder / "hashes")


def _drop_oldest(folder: Path) -> None:
    """Remove what was written first beyond the limit, what killed processes left half written among it."""
    with os.scandir(folder) as found:
        files = [entry for entry in found if entry.is_file(follow_symlinks=False)]
    if len(files) > _MAX_ENTRIES:
        with contextlib.suppress(FileNotFoundError):  # another process drops too
            files.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime)
            for entry in files[:-_MAX_ENTRIES]:
                os.unlink(entry.path)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _entry_name(real: str) -> str:
    return hashlib.sha256(os.fsencode(real)).hexdigest()
