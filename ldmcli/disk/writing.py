"""Files that appear whole under their final name or not at all.

Data goes to a hidden `.part` file in the same folder, is synced, and only then linked to its name. A
process killed at any instant leaves at most such a `.part` file behind.
"""

import contextlib
import errno
import itertools
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from ldmcli.errors import CannotCreateError, LdmError, StorageError, printable

_CANNOT_CREATE = {
    errno.EACCES, errno.EBUSY, errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENODEV, errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.ENXIO, errno.EPERM,
    errno.EROFS,
}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EXDEV}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EROFS}


def prepare_folder(folder: Path) -> None:
    """Make `folder` with its parents, and create and remove a file there to prove that it can be done.

    Raises CannotCreateError (read-only, no permission, a file in the way, name too long) or StorageError
    (full).
    """
    with named_errors(folder, "create a file in the folder"):
        try:
            os.makedirs(folder, exist_ok=True)
        except FileExistsError:
            raise CannotCreateError(f"'{printable(str(folder))}' is there already and is not a folder.") from None
        with _temporary_name(folder) as probe:
            os.close(_create(probe))


def make_folder(folder: Path) -> None:
    """Make `folder` and its missing parents so that they outlive a crash. Raises as `prepare_folder` does."""
    if os.path.isdir(folder):
        return
    make_folder(folder.parent)
    with named_errors(folder, "create the folder"):
        with contextlib.suppress(FileExistsError):  # another process was faster, or a file is in the way
            folder.mkdir()
        sync_folder(folder.parent)
    if not os.path.isdir(folder):
        raise CannotCreateError(f"'{printable(str(folder))}' is there already and is not a folder.")


def write_new(folder: Path, stem: str, data: bytes, *, overwrite: bool) -> Path:
    """Write `data` as the first free of `stem.png`, `stem-2.png` … in `folder`, and return that path.

    With `overwrite`, `stem.png` is replaced. Processes may choose the same stem at once: each gets its
    own file. Raises as `write_exact` does.
    """
    if stem in ("", ".", "..") or "/" in stem:
        raise CannotCreateError(f"'{printable(stem)}' cannot be a file name.")
    path = folder / f"{stem}.png"
    if overwrite:
        return write_exact(path, data, overwrite=True)
    with named_errors(path, "write"), _temporary_name(folder) as temporary:
        _write_synced(temporary, data)
        path = _place_at_first_free(temporary, folder, stem)
        sync_folder(folder)
    return path


def write_exact(path: Path, data: bytes, *, overwrite: bool) -> Path:
    """Write `data` to `path` and return it; the folder must exist.

    Replacing follows no symlink: the link itself becomes the file. Raises CannotCreateError when the file
    is there and `overwrite` is not given, when something other than a file is there, or when it cannot be
    created; StorageError when the disk is full or fails. The name then holds what it held before.
    """
    with named_errors(path, "write"):
        if os.path.lexists(path):
            check_replaceable(path, overwrite=overwrite)
        with _temporary_name(path.parent) as temporary:
            _write_synced(temporary, data)
            if overwrite:
                os.replace(temporary, path)
            else:
                _place(temporary, path)
            sync_folder(path.parent)
    return path


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Raise CannotCreateError where `path`, which is there, may not be replaced."""
    if not overwrite:
        raise CannotCreateError(f"'{printable(str(path))}' is there already; choose another name or --overwrite.")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise CannotCreateError(f"'{printable(str(path))}' is not a regular file and is not replaced.")


@contextlib.contextmanager
def _temporary_name(folder: Path) -> Iterator[Path]:
    """A name that no other process uses; the file is removed at the end whatever happens, unless renamed."""
    path = folder / f".ldm-{os.getpid()}-{secrets.token_hex(8)}.part"
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _create(path: Path) -> int:
    """A descriptor of the new file `path`, its mode 0o666 less the umask. Raises FileExistsError."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = _create(path)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(temporary: Path, final: Path) -> None:
    """Give the finished file its name. Raises FileExistsError when the name is taken, by whoever.

    Where the file system has no hard links, an empty file reserves the name first; a kill between the two
    calls leaves that empty file.
    """
    try:
        os.link(temporary, final)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        os.close(_create(final))
        try:
            os.replace(temporary, final)
        except BaseException:
            final.unlink(missing_ok=True)
            raise


def _place_at_first_free(temporary: Path, folder: Path, stem: str) -> Path:
    for number in itertools.count(1):
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        with contextlib.suppress(FileExistsError):
            _place(temporary, path)
            break
    return path


def sync_folder(folder: Path) -> None:
    """Make the new name durable, where the file system can sync a folder and lets it be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def named_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn what the system says into one sentence with the path, of the class that carries the exit code."""
    try:
        yield
    except OSError as error:
        raise _translated(error, path, doing) from error
    except ValueError as error:  # a NUL in the path, or one that has no encoding
        raise CannotCreateError(f"cannot {doing} '{printable(str(path))}': {error}.") from error


def _translated(error: OSError, path: Path, doing: str) -> LdmError:
    shown = printable(str(path))
    if isinstance(error, FileExistsError):
        return CannotCreateError(f"'{shown}' is there already; choose another name or --overwrite.")
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _FULL:
        return StorageError(f"cannot {doing} '{shown}': {reason}; free some space and run again.")
    kind = CannotCreateError if error.errno in _CANNOT_CREATE else StorageError
    return kind(f"cannot {doing} '{shown}': {reason}.")
