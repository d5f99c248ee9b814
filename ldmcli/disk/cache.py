"""What may be forgotten at any time: small files in the user's cache folder.

An entry store never raises for what the disk or the folder is like; a run goes on without, and a debug line says so
once. A folder that others own or can write to is left alone.
"""

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from ldmcli.disk.writing import write_exact
from ldmcli.errors import LdmError, printable

_log = logging.getLogger(__name__)
_MAX_BYTES = 1 << 16  # of an entry


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where this program's cache is, there or not: $XDG_CACHE_HOME/ldmcli, or ~/.cache/ldmcli where that is unset or
    not absolute. None where there is no home either. Source: the XDG base directory specification."""
    base = environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        home = environ.get("HOME") if "HOME" in environ else os.path.expanduser("~")
        base = os.path.join(home, ".cache") if home else ""
    return Path(base, "ldmcli") if os.path.isabs(base) else None


def make_private(folder: Path) -> None:
    """Make `folder` with its missing parents, all this user's alone. Raises OSError where it cannot be made, is not
    `check_private`, or where root would make it in another user's home."""
    missing = [path for path in folder.parents if not os.path.isdir(path)]
    if missing and os.geteuid() == 0 and os.stat(missing[-1].parent).st_uid != 0:
        raise PermissionError(errno.EPERM, "it is another user's", str(missing[-1].parent))
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
    _check_ours(folder.parent, os.stat(folder.parent))
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Raises OSError where others could have put something into `folder`. Its parent may be a link, to another disk
    say."""
    _check_ours(folder.parent, os.stat(folder.parent))
    _check_ours(folder, os.lstat(folder))


def _check_ours(folder: Path, status: os.stat_result) -> None:
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EACCES, "others own it or can write to it", str(folder))


class EntryStore:
    """Bytes by name, a file each in a private `folder`, made at the first write; the `max_entries` written last are
    kept. Threads and processes may use one folder at once. A folder of None holds and keeps nothing."""

    def __init__(self, folder: Path | None, max_entries: int = 1000) -> None:
        self._folder = folder
        self._max_entries = max_entries

    def read(self, name: str) -> bytes | None:
        """The entry `name`; None where there is none."""
        folder = self._folder
        if folder is None:
            return None
        path = folder / name
        try:
            check_private(folder)
            return path.read_bytes() if path.is_file() and path.stat().st_size <= _MAX_BYTES else None
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up(error)
            return None

    def write(self, name: str, payload: bytes) -> None:
        """Keep `payload`, a few kilobytes, as the entry `name`, in place of what it was."""
        folder = self._folder
        if folder is None:
            return
        try:
            make_private(folder)
            write_exact(folder / name, payload, overwrite=True)
            self._drop_oldest(folder)
        except (OSError, LdmError) as error:
            self._give_up(error)

    def _drop_oldest(self, folder: Path) -> None:
        """Remove what was written first beyond the limit, what killed processes left half written among it."""
        with os.scandir(folder) as found:
            files = [entry for entry in found if entry.is_file(follow_symlinks=False)]
        if len(files) > self._max_entries:
            with contextlib.suppress(FileNotFoundError):  # another process drops too
                files.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime)
                for entry in files[: -self._max_entries]:
                    os.unlink(entry.path)

    def _give_up(self, error: Exception) -> None:
        """Go without from now on, after one line."""
        folder, self._folder = self._folder, None
        if folder is not None:
            _log.debug("cache: %s goes unused: %s", printable(str(folder)), printable(str(error)))


def hash_store(*, enabled: bool = True) -> EntryStore:
    """The user's store for hashes of weight files; neither looked at nor made yet. One that is not `enabled` holds and
    keeps nothing."""
    folder = cache_folder() if enabled else None
    return EntryStore(folder and folder / "hashes")
