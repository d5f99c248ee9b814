"""Where pictures go: a folder, one named file, or standard output; and how each is reported."""

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmcli.cli.terminal import show_file, write_result
from ldmcli.disk.writing import check_replaceable, prepare_folder, write_exact, write_new
from ldmcli.errors import UsageError, printable
from ldmcli.frozen import frozen
from ldmcli.images.formats import ENDINGS, FORMATS, Encoding, format_of_name
from ldmcli.images.naming import NamePattern

STDOUT = "-"
_OTHER_FORMATS = {".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl", ".heic"}


@frozen
class Output:
    """A checked place for pictures. `path` None is standard output; `as_json` reports JSON lines instead of paths."""

    path: Path | None
    is_file: bool
    overwrite: bool
    as_json: bool
    ending: str = ".png"  # of files in a folder
    name: NamePattern | None = None  # of them; ldm-SEED without
    of_row: int = 1  # pictures of each prompt
    show: bool = False  # on the terminal too
    _written: Counter[str] = dataclasses.field(default_factory=Counter)  # pictures by name that this run wrote

    def write(self, data: bytes, seed: int, record: dict[str, Any]) -> None:
        """Write one picture and report it on stdout; raises CannotCreateError or StorageError."""
        if self.path is None:
            write_result(data)
            return
        if self.is_file:
            written = write_exact(self.path, data, overwrite=self.overwrite)
        else:
            stem = self._stem(seed, record)
            self._written[stem] += 1
            # what --overwrite may replace is not what this very run has drawn, of another prompt with the same seed
            if self.overwrite and self._written[stem] > 1:
                stem += f"-{self._written[stem]}"
            written = write_new(self.path, stem, data, overwrite=self.overwrite, ending=self.ending)
        if self.as_json:
            line = json.dumps({"path": str(written), **record}, ensure_ascii=True).encode("ascii")
        else:
            line = os.fsencode(written)
        write_result(line + b"\n")
        if self.show:
            show_file(written)

    def _stem(self, seed: int, record: dict[str, Any]) -> str:
        """The name of the next picture in the folder."""
        if self.name is None:
            return f"ldm-{seed}"
        number = self._written.total()
        row = number // self.of_row + 1
        return self.name.of(record, row=row, id=str(row), number=number + 1)


def in_folder(output: Output, names: Sequence[str]) -> list[Output]:
    """A file of its own for each of these names, in the output's folder. Raises UsageError where two would be one, and
    as `check_replaceable` does."""
    assert output.path
    places = [output.path / name for name in names]
    for place, count in Counter(places).items():
        if count > 1:
            raise UsageError(f"{count} pictures would be written to {printable(str(place))}; do it in several runs.")
        check_replaceable(place, overwrite=output.overwrite)
    return [dataclasses.replace(output, path=place, is_file=True) for place in places]


def choose_encoding(options: Mapping[str, Any]) -> Encoding:
    """How a command's options have it write pictures: in the format that is asked for, else that of the ending of the
    path, else PNG. Raises UsageError where these do not go together."""
    where, image_format = options["output"], options["image_format"]
    named = None if where == STDOUT or _is_folder(where) else format_of_name(Path(where))
    if named and image_format and named != image_format:
        raise UsageError(f"{printable(where)} ends as {FORMATS[named].title}, and --image-format says {image_format}.")
    return Encoding(image_format or named or "png", options["quality"], options["lossless"])


def open_output(
    where: str,
    encoding: Encoding,
    *,
    overwrite: bool,
    as_json: bool,
    one_image: bool,
    name: str | None = None,
    of_row: int = 1,
) -> Output:
    """Check a place before anything is loaded: `-`, a path with the ending of a picture, or a folder, as anything
    ending in / is, which is made if need be. `name` is the pattern of files in a folder, `of_row` how many pictures
    each prompt has.

    Raises UsageError or CannotCreateError.
    """
    path = Path(where)
    pattern = NamePattern(name) if name is not None else None
    if pattern is not None and (where == STDOUT or (format_of_name(path) is not None and not _is_folder(where))):
        raise UsageError("--name is for pictures in a folder; give a folder to -o, or leave it out.")
    if where == STDOUT:
        if as_json:
            raise UsageError("--json and -o - both want standard output; give a folder or a file to -o.")
        if sys.stdout.isatty():
            raise UsageError(
                "-o - writes a picture's data, and standard output is a terminal; redirect it to a file or a pipe."
            )
        return Output(None, True, overwrite, as_json)
    is_folder = _is_folder(where)
    if path.suffix.lower() in _OTHER_FORMATS and not is_folder:
        endings = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        raise UsageError(
            f"{printable(where)}: pictures are written as PNG, JPEG or WebP; name a folder, or a file in {endings}."
        )
    is_file = format_of_name(path) is not None and not is_folder
    if not is_file:
        prepare_folder(path)
        return Output(path, False, overwrite, as_json, encoding.ending, pattern, of_row)
    if not one_image:
        raise UsageError(f"{printable(where)} is one file, and more than one picture may come; give a folder to -o.")
    prepare_folder(path.parent)
    check_replaceable(path, overwrite=overwrite)
    return Output(path, True, overwrite, as_json)


def _is_folder(where: str) -> bool:
    return where.endswith(os.sep) or os.path.isdir(where)  # unlike Path.is_dir, never raises
