"""The pictures of a run as files: their names, how they get there whole, and which are there."""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ldmcli.batch.items import Item
from ldmcli.disk.writing import make_folder, named_errors, write_exact
from ldmcli.errors import StorageError
from ldmcli.images.formats import ENDINGS
from ldmcli.images.naming import SAFE_NAME

_IMAGES = "images"
_PER_FOLDER = 10_000
_NAME = re.compile(rf"(\d{{1,19}})-\d{{1,20}}(?:-(\d{{1,19}}))?(?:{'|'.join(map(re.escape, ENDINGS))})", re.ASCII)
PICTURE_PATH = re.compile(rf"{_IMAGES}/\d{{5,19}}/{SAFE_NAME}(?:{'|'.join(map(re.escape, ENDINGS))})", re.ASCII)


def picture_path(item: Item, ending: str = ".png") -> str:
    """Where a picture goes, from the run's folder on: by its own name, if it has one; else named by row and seed, and
    by its number where that is not its row's. The only picture of row 31235, with seed 7, is
    `images/00003/00031235-7.png`."""
    name = item.name or f"{item.row:08d}-{item.request.seed}"
    if not item.name and item.number != item.row - 1:  # rows can have several pictures, even with one seed
        name += f"-{item.number}"
    return f"{_IMAGES}/{item.number // _PER_FOLDER:05d}/{name}{ending}"


def write_picture(folder: Path, path: str, data: bytes) -> str:
    """Put a picture's `data` at `path` in the run's folder, whole and synced or not at all; returns its SHA-256.

    What is there already, of a run that was killed before it could say so, is replaced. Raises CannotCreateError, and
    StorageError where the disk is full or fails.
    """
    target = folder / path
    try:
        make_folder(target.parent)
        write_exact(target, data, overwrite=True)
    except StorageError as error:
        sentence = str(error).removesuffix(".")
        raise StorageError(f"{sentence}; the run can be resumed: the same command goes on where it stopped.") from error
    return hashlib.sha256(data).hexdigest()


def numbers_there(folder: Path) -> Iterator[int]:
    """The numbers of the pictures that are there and not empty, in any order, by the names that they have where no
    pattern says others. One listing for each subfolder."""
    for subfolder in _entries(folder / _IMAGES):
        for entry in _entries(Path(subfolder.path)) if subfolder.name.isdecimal() else ():
            if (named := _NAME.fullmatch(entry.name)) and _has_content(entry):
                number = int(named[1]) - 1 if named[2] is None else int(named[2])
                if number // _PER_FOLDER == int(subfolder.name):
                    yield number


def is_there(folder: Path, path: str) -> bool:
    """Whether the picture at `path` of the run's folder is there and not empty."""
    try:
        found = os.stat(folder / path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0


def clean_temporaries(folder: Path) -> None:
    """Remove what killed processes left half written. Only for the holder of the folder's lock: others' temporary
    files look the same."""
    for place in ("", f"{_IMAGES}/", f"{_IMAGES}/*/"):
        for path in folder.glob(f"{place}.ldm-*.part"):
            if path.is_file() and not path.is_symlink():
                with named_errors(path, "remove"):
                    path.unlink(missing_ok=True)


def _entries(folder: Path) -> Iterator["os.DirEntry[str]"]:
    """What is in a folder; nothing where it is not there."""
    with named_errors(folder, "list"):
        try:
            listing = os.scandir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        with listing:
            yield from listing


def _has_content(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file() and entry.stat().st_size > 0
    except OSError:  # gone since it was listed, or not readable
        return False
