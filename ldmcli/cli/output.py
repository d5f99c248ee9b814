"""Where pictures go: a folder, one named file, or standard output; and how each is reported."""

import dataclasses
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ldmcli.cli.terminal import write_result
from ldmcli.disk.writing import check_replaceable, prepare_folder, write_exact, write_new
from ldmcli.errors import UsageError, printable

STDOUT = "-"
_OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl", ".heic"}


@dataclasses.dataclass(frozen=True)
class Output:
    """A checked place for PNG data. `path` None is standard output; `as_json` reports JSON lines instead of paths."""

    path: Path | None
    is_file: bool
    overwrite: bool
    as_json: bool
    _of_seed: Counter[int] = dataclasses.field(default_factory=Counter)  # pictures written by this run

    def write(self, data: bytes, seed: int, record: dict[str, Any]) -> None:
        """Write one picture and report it on stdout; raises CannotCreateError or StorageError."""
        if self.path is None:
            write_result(data)
            return
        if self.is_file:
            written = write_exact(self.path, data, overwrite=self.overwrite)
        else:
            self._of_seed[seed] += 1
            # what --overwrite may replace is not what this very run has drawn, of another prompt with the same seed
            again = f"-{self._of_seed[seed]}" if self.overwrite and self._of_seed[seed] > 1 else ""
            written = write_new(self.path, f"ldm-{seed}{again}", data, overwrite=self.overwrite)
        if self.as_json:
            line = json.dumps({"path": str(written), **record}, ensure_ascii=True).encode("ascii")
        else:
            line = os.fsencode(written)
        write_result(line + b"\n")


def open_output(where: str, *, overwrite: bool, as_json: bool, one_image: bool) -> Output:
    """Check a place before anything is loaded: `-`, a path ending in .png, or a folder, as anything ending in / is,
    which is made if need be.

    Raises UsageError or CannotCreateError.
    """
    path = Path(where)
    if where == STDOUT:
        if as_json:
            raise UsageError("--json and -o - both want standard output; give a folder or a .png path to -o.")
        if sys.stdout.isatty():
            raise UsageError(
                "-o - writes PNG data, and standard output is a terminal; redirect it to a file or a pipe."
            )
        return Output(None, True, overwrite, as_json)
    is_folder = where.endswith(os.sep) or os.path.isdir(path)  # unlike Path.is_dir, never raises
    if path.suffix.lower() in _OTHER_FORMATS and not is_folder:
        raise UsageError(f"{printable(where)}: pictures are written as PNG; name a .png path or a folder.")
    is_file = path.suffix.lower() == ".png" and not is_folder
    if not is_file:
        prepare_folder(path)
        return Output(path, False, overwrite, as_json)
    if not one_image:
        raise UsageError(f"{printable(where)} is one file, and more than one picture may come; give a folder to -o.")
    prepare_folder(path.parent)
    check_replaceable(path, overwrite=overwrite)
    return Output(path, True, overwrite, as_json)
