"""The contact sheet: many pictures with their captions on one PNG, each read, shrunk and pasted before the next."""

import dataclasses
import functools
import io
import itertools
import logging
import math
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldmcli.disk.opening import PICTURES, open_regular
from ldmcli.disk.writing import write_exact
from ldmcli.errors import BadDataError, LdmError, UsageError, printable
from ldmcli.images.png import encode_png

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

MAX_PICTURES = 4000
MAX_SIDE = 16_384  # pixels; many viewers open nothing longer
MAX_PIXELS = 64_000_000  # 192 MB, and as much again while it is encoded
MIN_CELL, MAX_CELL = 96, 1024
_MARGIN, _GAP, _ROW_GAP, _UNDER = 20, 16, 24, 6  # pixels: around all, between cells, a picture and its caption
_MAX_LINES = 3
_MAX_CAPTION = 400  # characters looked at: more than three lines ever hold
_SHAPE = 1.4  # width to height that the sheet aims at
_PAPER, _INK, _EDGE, _FAULT = (255, 255, 255), (28, 28, 30), (208, 208, 212), (244, 240, 240)
_UNKNOWN = "\ufffd"  # not in the font either: comes out as its empty box
_SPELLED = {
    "ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "ı": "i",
    "ð": "d", "þ": "th", "–": "-", "—": "-", "−": "-", "×": "x", "„": "“", "«": "‹‹", "»": "››", "€": "EUR", "£": "GBP",
    "•": "·", "°": " deg", "→": "->", "←": "<-", "≤": "<=", "≥": ">=",
}  # fmt: skip

_log = logging.getLogger(__name__)


class SheetPicture(NamedTuple):
    """One cell: a PNG file, or pixels (H, W, 3) uint8 RGB; and the text under it."""

    picture: "Path | np.ndarray"
    caption: str


@dataclasses.dataclass(frozen=True)
class Sheet:
    """What came of a sheet: how many pictures stand on it, found no room, and could not be read. Nothing shown means
    that there was nothing to show, and no file."""

    shown: int
    left_out: int = 0
    unreadable: int = 0


class _Grid(NamedTuple):
    """Cells of `cell` pixels a side, each with `lines` of caption; the font is made for it."""

    columns: int
    rows: int
    cell: int
    font: "ImageFont.FreeTypeFont | ImageFont.ImageFont"
    line: int  # pixels from one line of text to the next
    lines: int

    @property
    def pitch(self) -> int:
        """From one row of cells to the next."""
        return self.cell + _UNDER + self.lines * self.line + _ROW_GAP

    @property
    def width(self) -> int:
        return 2 * _MARGIN + self.columns * (self.cell + _GAP) - _GAP

    @property
    def height(self) -> int:
        return 2 * _MARGIN + self.rows * self.pitch - _ROW_GAP

    @property
    def fits(self) -> bool:
        return max(self.width, self.height) <= MAX_SIDE and self.width * self.height <= MAX_PIXELS


def write_sheet(
    path: Path,
    pictures: Iterable[SheetPicture],
    *,
    columns: int | None = None,
    cell: int = 256,
    overwrite: bool = False,
) -> Sheet:
    """Write a contact sheet of `pictures` in their order to `path`.

    `cell` is the side of the square that each picture is fitted into; many pictures get smaller ones, so that all
    find room. What finds none even so, or cannot be read, is counted and said in the log. Memory: the sheet twice, at
    most MAX_PIXELS, and one picture. Raises UsageError where `columns` or `cell` is out of range, else as
    `write_exact`.
    """
    if not MIN_CELL <= cell <= MAX_CELL:
        raise UsageError(f"the cell of a contact sheet takes {MIN_CELL} to {MAX_CELL} pixels, not {cell}.")
    most = (MAX_SIDE - 2 * _MARGIN + _GAP) // (MIN_CELL + _GAP)
    if columns is not None and not 1 <= columns <= most:
        raise UsageError(f"a contact sheet has 1 to {most} columns, not {columns}.")
    source = iter(pictures)
    shown = list(itertools.islice(source, MAX_PICTURES))
    if not shown:
        _log.info("there is no picture for a contact sheet; none is written")
        return Sheet(0)
    grid = _grid(len(shown), columns, cell)
    left_out = len(shown[grid.columns * grid.rows :]) + sum(1 for _ in source)
    del shown[grid.columns * grid.rows :]
    pixels, unreadable = _drawn(grid, shown)
    write_exact(path, encode_png(pixels, {}), overwrite=overwrite)
    name = printable(str(path))
    if left_out:
        _log.warning("%s shows the first %d pictures; %d more find no room on it", name, len(shown), left_out)
    if unreadable:
        _log.warning("%s: %d pictures cannot be read and are shown as empty cells", name, unreadable)
    return Sheet(len(shown), left_out, unreadable)


def _grid(count: int, columns: int | None, cell: int) -> _Grid:
    """The layout for `count` pictures with the largest cells up to `cell` that let all of them in; with the smallest,
    as many rows as there is room for."""
    for side in [*range(cell, MIN_CELL, -16), MIN_CELL]:
        grid = _layout(count, columns, side)
        if grid.fits:
            return grid
    rows = range(grid.rows, 1, -1)
    return next((shorter for n in rows if (shorter := grid._replace(rows=n)).fits), grid._replace(rows=1))


def _layout(count: int, columns: int | None, cell: int) -> _Grid:
    from PIL import ImageFont

    size = max(11, min(18, round(cell / 18)))
    grid = _Grid(1, 1, cell, ImageFont.load_default(size), round(size * 1.3), _MAX_LINES)
    if columns is None:
        columns = min(count, max(1, math.ceil(math.sqrt(count * _SHAPE * grid.pitch / (cell + _GAP)))))
    return grid._replace(columns=columns, rows=math.ceil(count / columns))


def _drawn(grid: _Grid, pictures: Sequence[SheetPicture]) -> tuple["np.ndarray", int]:
    """The sheet, (H, W, 3) uint8, and how many of `pictures` could not be read."""
    import numpy as np
    from PIL import Image, ImageDraw

    texts = [wrapped(caption, grid.cell, grid.font) for _, caption in pictures]
    grid = grid._replace(lines=max(map(len, texts)), columns=min(grid.columns, len(pictures)))
    sheet = np.full((grid.height, grid.width, 3), _PAPER[0], np.uint8)
    unreadable = 0
    for number, (entry, text) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(number, grid.columns)
        tile = Image.new("RGB", (grid.cell, grid.pitch - _ROW_GAP), _PAPER)
        draw = ImageDraw.Draw(tile)
        try:
            picture = _fitted(entry.picture, grid.cell)
        except LdmError as error:
            _log.debug("%s", error)
            unreadable += 1
            _draw_fault(draw, grid)
        else:
            left, top = (grid.cell - picture.width) // 2, (grid.cell - picture.height) // 2
            tile.paste(picture, (left, top))
            draw.rectangle((left, top, left + picture.width - 1, top + picture.height - 1), outline=_EDGE)
        for line, words in enumerate(text):
            draw.text((0, grid.cell + _UNDER + line * grid.line), words, fill=_INK, font=grid.font)
        top, left = _MARGIN + row * grid.pitch, _MARGIN + column * (grid.cell + _GAP)
        sheet[top : top + tile.height, left : left + tile.width] = np.asarray(tile)
    return sheet, unreadable


def _draw_fault(draw: "ImageDraw.ImageDraw", grid: _Grid) -> None:
    """An empty cell that says why."""
    draw.rectangle((0, 0, grid.cell - 1, grid.cell - 1), fill=_FAULT, outline=_EDGE)
    middle = grid.cell // 2
    draw.text((middle, middle), "cannot be read", fill=_INK, font=grid.font, anchor="mm")


def _fitted(picture: "Path | np.ndarray", cell: int) -> "Image.Image":
    """`picture` as RGB within a square of `cell`: shrunk smoothly, or enlarged by a whole factor so that small ones
    keep their pixels. Raises an LdmError where it cannot be read."""
    from PIL import Image

    image = _read(picture) if isinstance(picture, Path) else Image.fromarray(picture)
    factor = cell // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((cell, cell), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def _read(path: Path) -> "Image.Image":
    """The PNG file `path`, what is transparent laid on paper. Raises an LdmError."""
    from PIL import Image

    with open_regular(path, PICTURES) as raw:
        try:
            with Image.open(io.BufferedReader(raw), formats=["PNG"]) as image:
                if not image.has_transparency_data:
                    return image.convert("RGB")
                layered = image.convert("RGBA")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadDataError(f"'{printable(str(path))}' cannot be read: {printable(str(error))}.") from error
    return Image.alpha_composite(Image.new("RGBA", layered.size, _PAPER), layered).convert("RGB")


def wrapped(text: str, width: int, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont") -> list[str]:
    """`text` in up to three lines of `width` pixels, long words broken, what is cut off marked by …"""
    spelled = "".join(_drawable(char) for char in unicodedata.normalize("NFC", text[:_MAX_CAPTION]))
    words = spelled.split()
    lines: list[str] = []
    while words and len(lines) < _MAX_LINES:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += f" {words.pop(0)}"
        kept = _longest_start(line, width, font)
        if kept < len(line):
            words.insert(0, line[kept:])
        lines.append(line[:kept])
    if words or len(text) > _MAX_CAPTION:
        last = lines[-1] if lines else ""
        lines[-1:] = [last[: _longest_start(last, width - math.ceil(font.getlength("…")), font)].rstrip(" ,") + "…"]
    return lines


def _longest_start(text: str, width: int, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont") -> int:
    """How many characters of `text` fit into `width` pixels: all, or 1 at the least."""
    kept = len(text)
    while kept > 1 and font.getlength(text[:kept]) > width:
        kept -= 1
    return kept


@functools.lru_cache(4096)
def _drawable(char: str) -> str:
    """`char`, or what comes nearest to it in the letters of Pillow's own font, which has little beyond ASCII: the
    letter without its accent, an emoji's name in brackets, else an empty box. Nothing where nothing is to be seen."""
    category = unicodedata.category(char)
    if category in ("Cc", "Zs", "Zl", "Zp"):
        return " "
    if category in ("Cf", "Mn", "Me"):  # joiners, direction marks, accents and variation selectors
        return ""
    if char in _SPELLED:
        return _SPELLED[char]
    plain = [c for c in unicodedata.normalize("NFKD", char) if unicodedata.category(c) != "Mn"]
    if plain and all(_in_font(c) for c in plain):
        return "".join(plain)
    if category == "So":
        return f"[{unicodedata.name(char, 'symbol').lower()}]"
    return _UNKNOWN


@functools.lru_cache(4096)
def _in_font(char: str) -> bool:
    """Whether Pillow's font has a glyph of its own for `char`, and not the box that stands for all others."""
    from PIL import ImageFont

    font = ImageFont.load_default(14)
    glyph, box = font.getmask(char), font.getmask(_UNKNOWN)
    return glyph.size != box.size or bytes(glyph) != bytes(box)
