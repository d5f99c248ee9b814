"""The formats that pictures are written in and read from, by name, by a file's ending and by its first bytes."""

import dataclasses
import os
import stat
from pathlib import Path
from typing import NamedTuple

from ldmcli.errors import UsageError

QUALITY = 90  # of JPEG, and of WebP with loss, unless asked
_MAGIC_BYTES = 12  # of a file, by which its format is known


class Format(NamedTuple):
    """`title` is Pillow's name too; `endings` of files, the usual first; `max_side` in pixels."""

    title: str
    endings: tuple[str, ...]
    max_side: int


FORMATS = {
    "png": Format("PNG", (".png",), (1 << 31) - 1),
    "jpeg": Format("JPEG", (".jpg", ".jpeg"), (1 << 16) - 1),
    "webp": Format("WebP", (".webp",), (1 << 14) - 1),
}
ENDINGS = tuple(ending for known in FORMATS.values() for ending in known.endings)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a picture becomes a file: `format` is one of FORMATS; `quality` 1 to 100, for JPEG and WebP, None for the
    usual; `lossless` is for WebP. Raises UsageError for what the format has not."""

    format: str = "png"
    quality: int | None = None
    lossless: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"format {self.format!r} is not known; choose from {', '.join(FORMATS)}.")
        if self.quality is not None and (self.format == "png" or self.lossless):
            kind = "PNG" if self.format == "png" else "lossless WebP"
            raise UsageError(f"--quality is for JPEG and WebP, and {kind} loses nothing; leave it out.")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UsageError(f"quality {self.quality} is not a whole number from 1 to 100.")
        if self.lossless and self.format == "jpeg":
            raise UsageError("--lossless is for WebP, and JPEG always loses something; leave it out.")

    @property
    def ending(self) -> str:
        """Of a file's name."""
        return FORMATS[self.format].endings[0]

    @property
    def settings(self) -> dict[str, str | int | bool]:
        """What is not as usual, in words of the command line."""
        said = {"image_format": self.format, "quality": self.quality, "lossless": self.lossless}
        return {} if self.format == "png" else {name: value for name, value in said.items() if value}

    def check_size(self, width: int, height: int) -> None:
        """Raise UsageError where the format cannot hold so many pixels a side."""
        title, _, limit = FORMATS[self.format]
        if max(width, height) > limit:
            raise UsageError(
                f"a picture of {width}×{height} is too large for {title}, which holds {limit} pixels a side."
            )


def format_of_name(path: Path) -> str | None:
    """The format that a file's ending names."""
    ending = path.suffix.lower()
    return next((name for name, known in FORMATS.items() if ending in known.endings), None)


def format_of_file(path: Path) -> str | None:
    """The format of a regular file by its first bytes; None where it is in none of them or cannot be read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:  # /proc/kmsg waits for who reads it
            return None
        with open(path, "rb") as file:
            return format_of_bytes(file.read(_MAGIC_BYTES))
    except (OSError, ValueError):
        return None


def format_of_bytes(start: bytes) -> str | None:
    """The format of a file that begins with `start`."""
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if start.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if start[:4] == b"RIFF" and start[8:12] == b"WEBP" else None
