"""One run per folder: the lock, and word of who holds it for whoever comes second. The only importer of filelock."""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from ldmcli.disk.opening import open_regular, shown
from ldmcli.disk.writing import make_folder, named_errors, write_exact
from ldmcli.errors import LdmError, TryAgainError, printable

LOCK_NAME = ".lock"
_HOLDER_NAME = ".lock.json"  # beside the lock: some versions of filelock empty the lock's own file
_MAX_HOLDER_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Holder:
    """What the process says of itself that holds a folder; `here`: it is one of this machine."""

    pid: int
    host: str
    since: str

    @property
    def here(self) -> bool:
        return self.host == platform.node()


def held_by(folder: Path) -> Holder | None:
    """Who holds `folder`, told without touching the lock; None where nobody does, or a process that was killed."""
    found = _read_holder(folder)
    return None if found is None or (found.here and not _is_alive(found.pid)) else found


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if it is missing, against other runs; the system lets go when the process ends, even killed.

    Raises TryAgainError naming the holder where another run has it, CannotCreateError or StorageError where the lock
    cannot be written.
    """
    import filelock

    make_folder(folder)
    lock = filelock.FileLock(folder / LOCK_NAME, timeout=0, thread_local=False)
    with named_errors(folder / LOCK_NAME, "lock"):
        try:
            lock.acquire()
        except filelock.Timeout:
            raise TryAgainError(
                f"{shown(folder)} is being written by {_holder(folder)}; wait for it or choose another folder."
            ) from None
    holder = folder / _HOLDER_NAME
    try:
        write_exact(holder, json.dumps(_this_process()).encode("ascii"), overwrite=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def _this_process() -> dict[str, str | int]:
    since = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
    return {"pid": os.getpid(), "host": platform.node(), "since": since}


def _holder(folder: Path) -> str:
    """Who holds the lock, as far as it has said so already."""
    found = _read_holder(folder)
    return printable(f"process {found.pid} on {found.host} since {found.since}") if found else "another process"


def _read_holder(folder: Path) -> Holder | None:
    try:
        with open_regular(folder / _HOLDER_NAME, ("", "")) as file:
            said = json.loads(file.read(_MAX_HOLDER_BYTES))
        return Holder(int(said["pid"]), str(said["host"]), str(said["since"]))
    except (LdmError, ValueError, RecursionError, KeyError, TypeError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
