"""Files that appear whole under their final name or not at all, and never in place of what is not ours.

Data goes to a hidden `.part` file in the same folder, is synced, and only then linked to its name. A process killed at
any instant leaves at most such a `.part` file behind.
"""

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ldmcli.disk.opening import open_regular, shown
from ldmcli.errors import CannotCreateError, LdmError, StorageError

_CANNOT_CREATE = {
    errno.EACCES, errno.EBUSY, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENODEV, errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.ENXIO, errno.EPERM, errno.EROFS,
}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT}
_MARKED = 4096  # bytes at the start of a file, among which its marker stands


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
        raise CannotCreateError(f"{shown(folder)} is there already and is not a folder.")


def prepare_folder(folder: Path) -> None:
    """Make `folder` with its parents, and create and remove a file there to prove that it can be done.

    Raises CannotCreateError (read-only, no permission, a file in the way, name too long) or StorageError (full).
    """
    make_folder(folder)
    with named_errors(folder, "create a file in the folder"), _temporary_name(folder) as probe:
        open(probe, "xb").close()


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Raise CannotCreateError where `path` can be no file, or is there and may not be replaced."""
    with named_errors(path, "write"):
        try:
            os.lstat(path)
        except FileNotFoundError:
            return
    if not overwrite:
        raise _taken(path)
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise CannotCreateError(f"{shown(path)} is not a regular file and is not replaced.")


def check_may_write(path: Path, marker: bytes, what: str, option: str) -> None:
    """Raise CannotCreateError unless `path` is new or ours: has `marker` near its start, as each `what` that this
    program writes. `option` names the file. To be called before hours of drawing, and again before writing."""
    try:
        check_replaceable(path, overwrite=False)
    except CannotCreateError:
        if not is_marked(path, marker):
            raise CannotCreateError(
                f"{shown(path)} is there already and is no {what} of ldm's; move it away or choose another {option}."
            ) from None


def is_marked(path: Path, marker: bytes) -> bool:
    """Whether `path` is a file with `marker` near its start."""
    try:
        with open_regular(path) as file:
            return marker in file.read(_MARKED)
    except LdmError:
        return False


def write_new(folder: Path, stem: str, data: bytes, *, overwrite: bool, ending: str = ".png") -> Path:
    """Write `data` as the first free of `stem.png`, `stem-2.png` … in `folder`, and return that path. `stem` is a plain
    file name; `ending` may be another.

    With `overwrite`, `stem.png` is replaced. Processes may choose the same stem at once: each gets its
    own file. Raises as `write_exact` does.
    """
    if overwrite:
        return write_exact(folder / f"{stem}{ending}", data, overwrite=True)
    with named_errors(folder / f"{stem}{ending}", "write"):
        for number in itertools.count(1):
            path = folder / (f"{stem}{ending}" if number == 1 else f"{stem}-{number}{ending}")
            if not os.path.lexists(path):
                with contextlib.suppress(FileExistsError):  # another process was faster
                    _write(path, data, overwrite=False)
                    break
    return path


def write_exact(path: Path, data: bytes, *, overwrite: bool) -> Path:
    """Write `data` to `path` and return it; a folder that has gone is made anew.

    Replacing follows no symlink: the link itself becomes the file. Raises CannotCreateError when the file
    is there and `overwrite` is not given, when something other than a file is there, or when it cannot be
    created; StorageError when the disk is full or fails. The name then holds what it held before.
    """
    check_replaceable(path, overwrite=overwrite)
    with named_errors(path, "write"):
        _write(path, data, overwrite=overwrite)
    return path


def _write(path: Path, data: bytes, *, overwrite: bool) -> None:
    make_folder(path.parent)
    with _temporary_name(path.parent) as temporary:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            _sync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _place(temporary, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def _temporary_name(folder: Path) -> Iterator[Path]:
    """A name that no other process uses; the file is removed at the end whatever happens, unless renamed."""
    path = folder / f".ldm-{os.getpid()}-{os.urandom(8).hex()}.part"
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _place(temporary: Path, final: Path) -> None:
    """Give the finished file its name. Raises FileExistsError when the name is taken, by whoever.

    Where the file system has no hard links, an empty file reserves the name first; a kill between the two
    calls leaves that empty file.
    """
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError:
        open(final, "xb").close()
        try:
            os.replace(temporary, final)
        except BaseException:
            final.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Make the new name durable, where the file system can sync a folder and lets it be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.EROFS, *_FULL):  # other errors say that it cannot be done here
            raise


@contextlib.contextmanager
def named_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn what the system says into one sentence with the path, of the class that carries the exit code."""
    try:
        yield
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError as error:
        kind = CannotCreateError if error.errno in _CANNOT_CREATE else StorageError
        reason = os.strerror(error.errno) if error.errno else str(error)
        cure = "; free some space and run again" if error.errno in _FULL else ""
        raise kind(f"cannot {doing} {shown(path)}: {reason}{cure}.") from error
    except ValueError as error:  # a NUL in the path, or one that has no encoding
        raise CannotCreateError(f"cannot {doing} {shown(path)}: {error}.") from error


def _taken(path: Path) -> CannotCreateError:
    return CannotCreateError(f"{shown(path)} is there already; choose another name or --overwrite.")
