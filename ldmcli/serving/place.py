"""Where the server of this user listens, safe from other users, and by what client and server know that they agree."""

import contextlib
import os
import stat
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldmcli import __version__
from ldmcli.errors import CannotCreateError, TryAgainError, UsageError, printable

if TYPE_CHECKING:
    import socket

_NAME = "ldm.sock"
_BACKLOG = 128
_folder = threading.Lock()
_LONGEST = 107  # bytes of a socket's path
# What may change pictures, or where files are found.
_PREFIXES = (
    "ATEN_", "CUBLAS", "CUDA", "CUDNN", "DNNL_", "GOMP_", "HF_", "HUGGING", "KMP_", "LD_", "MKL_", "NVIDIA_", "OMP_",
    "ONEDNN_", "OPENBLAS_", "PYTORCH_", "TORCH", "TRITON",
)  # fmt: skip
_INDIFFERENT = ("GOMP_SPINCOUNT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # which programs set by themselves
_NAMES = ("HOME", "LDM_MODELS", "TMPDIR", "XDG_CACHE_HOME")


def socket_path(environ: Mapping[str, str] = os.environ) -> Path:
    """$LDM_SERVER; else a socket in $XDG_RUNTIME_DIR where that is this user's alone, else in a folder of temporary
    files. Raises UsageError where $LDM_SERVER can be no socket."""
    named = environ.get("LDM_SERVER")
    if named:
        path = Path(os.path.abspath(os.path.expanduser(named)))
        if len(os.fsencode(path)) > _LONGEST or "\0" in named:
            raise UsageError(f"LDM_SERVER {printable(named)} is too long for a socket; name one of fewer letters.")
        return path
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and len(os.fsencode(runtime)) + len(_NAME) < _LONGEST and is_private(Path(runtime)):
        return Path(runtime, _NAME)
    temporary = environ.get("TMPDIR", "")
    if not os.path.isabs(temporary) or len(os.fsencode(temporary)) > _LONGEST - 40:
        temporary = "/tmp"
    return Path(temporary, f"ldm-{os.geteuid()}", _NAME)


def is_private(folder: Path) -> bool:
    """Whether `folder` is one, no link, this user's, and closed to all others."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def prepare_place(path: Path) -> None:
    """Make the folder that a server's socket is in. Raises CannotCreateError where others could enter it."""
    with contextlib.suppress(FileExistsError), _named_errors(path.parent):
        os.mkdir(path.parent, 0o700)
    if not os.environ.get("LDM_SERVER") and not is_private(path.parent):
        raise CannotCreateError(
            f"{printable(str(path.parent))} is not a folder that only you can enter; remove it, or name a socket by "
            "LDM_SERVER."
        )


@contextlib.contextmanager
def listening(path: Path) -> "Iterator[socket.socket]":
    """A socket at `path` inside the block, in place of one whose server was killed. Raises TryAgainError where another
    server has it, CannotCreateError where it cannot be made."""
    import fcntl
    import socket

    prepare_place(path)
    _check_free(path)
    with contextlib.ExitStack() as stack:
        try:
            lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _check_free(path, of_servers=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            before = os.umask(0o177)
            try:
                listener.bind(os.fspath(path))
            finally:
                os.umask(before)
            listener.listen(_BACKLOG)
        except BlockingIOError:
            raise TryAgainError(f"a server of yours is running already at {printable(str(path))}.") from None
        except OSError as error:
            raise CannotCreateError(f"cannot listen at {printable(str(path))}: {error.strerror}.") from None
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):  # gone already, with its folder
                os.unlink(path)


def _check_free(path: Path, *, of_servers: bool = False) -> None:
    """Raises CannotCreateError where a file is, or `of_servers` another program's socket: none of them is to go."""
    import socket

    try:
        kind = "" if stat.S_ISSOCK(os.lstat(path).st_mode) else "is no socket"
    except OSError:  # nothing is there
        return
    if of_servers and not kind:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, contextlib.suppress(OSError):
            client.connect(os.fspath(path))
            kind = "is another program's"
    if kind:
        raise CannotCreateError(f"{printable(str(path))} {kind}; have LDM_SERVER name another place.")


@contextlib.contextmanager
def in_folder(folder: str) -> Iterator[None]:
    """Inside the block the process is in a client's folder, so that names mean and messages say what they do there; one
    client at a time. What draws has names that are found from anywhere."""
    with _folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir("/")


def is_safe(path: Path) -> bool:
    """Whether a socket may be connected to: this user's, and where no other user could have put it in place of one."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    own = stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid()
    return own and bool(os.environ.get("LDM_SERVER") or is_private(path.parent))


def peer_is_user(connection: "socket.socket") -> bool:
    """Whether the process at the other end is this user's."""
    import socket

    size = struct.calcsize("iII")
    _, user, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(user == os.geteuid())


def agreement() -> str:
    """What a client and a server must have in common so that one draws what the other would: this program's version and
    files, Python, torch, the processors and the part of the environment that tells."""
    package = Path(__file__).resolve().parent.parent
    known = [__version__, sys.executable, sys.version, repr(sorted(os.sched_getaffinity(0)))]
    known += _stamps(str(package))
    for folder in sys.path:
        with contextlib.suppress(OSError):
            known.append(_stamp(os.path.join(folder, "torch", "version.py"), os.stat(f"{folder}/torch/version.py")))
            break
    with contextlib.suppress(OSError):
        known.append(os.readlink("/proc/self/ns/mnt"))
    told = (name for name in os.environ if name in _NAMES or name.startswith(_PREFIXES))
    known += sorted(f"{name}={os.environ[name]}" for name in told if name not in _INDIFFERENT and "TOKEN" not in name)
    return "\0".join(known)


def _stamps(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.endswith(".py"):
                yield _stamp(entry.path, entry.stat())
            elif entry.name not in ("__pycache__", "weights") and entry.is_dir():
                yield from _stamps(entry.path)


def _stamp(path: str, status: os.stat_result) -> str:
    return f"{path} {status.st_size} {status.st_mtime_ns}"


@contextlib.contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise CannotCreateError(f"cannot create {printable(str(folder))}: {error.strerror}.") from None
