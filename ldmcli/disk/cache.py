"""The user's cache folder, and folders that are the user's alone: what others own or can write to is left alone."""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where this program's cache is, there or not: $XDG_CACHE_HOME/ldmcli, or ~/.cache/ldmcli where that is unset or
    not absolute. None where there is no home either. Source: the XDG base directory specification."""
    base = environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        home = environ.get("HOME") if "HOME" in environ else os.path.expanduser("~")
        base = os.path.join(home, ".cache") if home else ""
    return Path(base, "ldmcli") if os.path.isabs(base) else None


def is_news(fact: str, *, remember: bool = True) -> bool:
    """Whether a fact about this machine differs from what was last said of it, which the cache keeps in a small file;
    True where it cannot. `remember` False leaves the cache alone."""
    folder = cache_folder()
    if not remember or folder is None:
        return True
    file = folder / "machine" / hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:16]
    try:
        with contextlib.suppress(FileNotFoundError):
            if file.read_text("utf-8")[:100] == fact:
                return False
        make_private(folder)
        make_private(file.parent)
        temporary = file.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(fact)
        temporary.replace(file)
    except (OSError, ValueError):
        pass  # a cache that cannot be written forgets
    return True


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
