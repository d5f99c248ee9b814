"""Opening files that others named: regular files only, and errors that say what is there instead."""

import contextlib
import errno
import io
import itertools
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldmcli.errors import BadDataError, LdmError, MissingInputError, StorageError, printable

WEIGHTS = (".safetensors", "name a weight file (.safetensors), or a folder with model_index.json")
PICTURES = ((".png", ".jpg", ".jpeg", ".webp"), "name a PNG, JPEG or WebP file")
_Wanted = tuple[str | tuple[str, ...], str]
PARTS = ("", "the model folder is damaged, get it again")
_LISTED = 2000  # names compared with a missing one: difflib needs ≈ 0.1 s for them


@contextlib.contextmanager
def open_regular(path: Path, wanted: _Wanted = WEIGHTS) -> Iterator[io.FileIO]:
    """Open `path`, unbuffered; stat comes first, since opening a FIFO or a device can block or act.

    `wanted` is the ending of the files that would do and the advice where `path` is none of them.

    Raises MissingInputError (not there, not readable), BadDataError (no regular file), StorageError (also
    where reading fails in the body of the `with`).
    """
    try:
        _check_regular(path, os.stat(path), wanted)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise _cannot_open(path, error) from None
    with open(descriptor, "rb", buffering=0) as raw:
        _check_regular(path, os.fstat(descriptor), wanted)  # the name may lead elsewhere by now
        try:
            yield raw
        except OSError as error:
            raise StorageError(f"reading {shown(path)} failed: {printable(str(error))}.") from None


def read_text(path: Path, max_bytes: int) -> str:
    """The UTF-8 text of a file that belongs to a model folder; raises as `open_regular` does, BadDataError beyond
    `max_bytes` or where it is no UTF-8."""
    if not os.path.lexists(path):
        raise MissingInputError(f"{shown(path)} is missing; the model folder is incomplete.")
    with open_regular(path, PARTS) as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise bad_file(path, f"is over {max_bytes >> 20} MiB, far too large for what it is", PARTS[1])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad_file(path, f"is not UTF-8 text ({error})", PARTS[1]) from None


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file of a model folder; raises as `read_text` does."""
    try:
        value = json.loads(read_text(path, max_bytes))
    except (ValueError, RecursionError) as error:
        raise bad_file(path, f"is not valid JSON: {error}", PARTS[1]) from None
    if not isinstance(value, dict):
        raise bad_file(path, "does not hold a JSON object", PARTS[1])
    return value


def _check_regular(path: Path, status: os.stat_result, wanted: _Wanted) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    if stat.S_ISDIR(status.st_mode):
        inside = listing(path, wanted[0])
        have = f" (it has {', '.join(inside)})" if inside else ""
        raise bad_file(path, f"is a folder{have}", wanted[1])
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    raise bad_file(path, f"is {kinds.get(stat.S_IFMT(status.st_mode), 'no regular file')}", wanted[1])


def _cannot_open(path: Path, error: OSError | ValueError) -> LdmError:
    code = error.errno if isinstance(error, OSError) else errno.ENOENT  # else NUL or a surrogate in the path
    if code in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return missing(path)
    if code in (errno.EACCES, errno.EPERM):
        return MissingInputError(f"{shown(path)} is not readable; check its permissions and its folder's.")
    if code == errno.ELOOP:
        return bad_file(path, "is a link that leads in a circle", "name the file itself")
    return StorageError(f"{shown(path)} cannot be opened: {printable(str(error))}.")


def missing(path: Path) -> MissingInputError:
    """The error for a path to nothing, with the nearest names that are there."""
    return MissingInputError(_missing_message(path))


def _missing_message(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        if path.is_symlink():
            target = printable(os.readlink(path))
            return f"{shown(path)} is a link to {target}, which does not exist; mend the link or name another file."
        if not path.parent.exists():
            return f"{shown(path)} does not exist, nor does its folder; check the path."
        names = listing(path.parent, "", _LISTED)
        import difflib

        if near := difflib.get_close_matches(path.name[:255], names, 3, 0.6):
            return f"{shown(path)} does not exist; its folder has {', '.join(near)}."
    return f"{shown(path)} does not exist; check the path."


def listing(folder: Path, suffix: str | tuple[str, ...], limit: int = 3) -> list[str]:
    """Up to `limit` names in `folder` that end in `suffix`, escaped; looks at 10,000 entries at most."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, 10_000) if entry.name.endswith(suffix)]
    except OSError:
        return []
    return [printable(name) for name in sorted(names)[:limit]]


def without_home(path: str) -> str:
    """A path as it may stand in a picture that is given away: without the name of the user's home."""
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry of this user
        return path
    inside = home != Path("/") and Path(path).is_relative_to(home)
    return str(Path("~") / Path(path).relative_to(home)) if inside else path


def bad_file(path: Path, cause: str, cure: str) -> BadDataError:
    """The error "PATH CAUSE; CURE.", with everything that came from outside escaped."""
    return BadDataError(f"{shown(path)} {printable(cause, 600)}; {cure}.")


def shown(path: Path) -> str:
    """`path` as it may be printed; in quotes where it begins or ends with a blank."""
    text = str(path)
    return printable(text if text == text.strip() else repr(text), 500)
