"""The contact sheet: many pictures with their captions on one PNG, each read, shrunk and pasted before the next."""

import functools
import io
import itertools
import logging
import math
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldmcli import __version__
from ldmcli.disk.opening import PICTURES, open_regular, shown
from ldmcli.disk.writing import check_may_write, prepare_folder, write_exact
from ldmcli.errors import BadDataError, LdmError, printable
from ldmcli.images.encode import encode_image
from ldmcli.images.formats import FORMATS

if TYPE_CHECKING:
    from PIL import Image, ImageFont

    _Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MAX_PICTURES = 3000  # with the smallest cells they fit
MAX_PIXELS = 64_000_000  # 256 MB
_CELLS = range(256, 95, -16)  # pixels: sides of the square that each picture is fitted into
_MARGIN, _GAP, _ROW_GAP, _UNDER = 20, 16, 24, 6  # pixels: around all, between cells, a picture and its caption
_MAX_LINES = 3
_MAX_CAPTION = 400  # characters looked at: more than three lines ever hold
_SHAPE = 1.4  # width to height that the sheet aims at
_PAPER, _INK, _EDGE, _FAULT = "#ffffff", "#1c1c1e", "#d0d0d4", "#f4f0f0"
_PNG = b"\x89PNG\r\n\x1a\n"
_KEYWORD = "ldmcli-sheet"
_UNKNOWN = "\ufffd"  # not in the font either: comes out as its empty box
_SPELLED = {
    "ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "ı": "i",
    "ð": "d", "þ": "th", "–": "-", "—": "-", "−": "-", "×": "x", "„": "“", "«": "‹‹", "»": "››", "€": "EUR", "£": "GBP",
    "•": "·", "°": " deg", "→": "->", "←": "<-", "≤": "<=", "≥": ">=",
}  # fmt: skip

_log = logging.getLogger(__name__)


class SheetPicture(NamedTuple):
    """One cell: a picture's file and the text under it."""

    path: Path
    caption: str


class _Grid(NamedTuple):
    """Cells of `cell` pixels a side, each with `lines` of caption in `font`."""

    columns: int
    rows: int
    cell: int
    font: "_Font"
    line: int  # pixels from one line of text to the next
    lines: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet."""
        right, bottom = self.place(self.rows * self.columns - 1)
        return right + self.cell + _MARGIN, bottom + self.pitch - _ROW_GAP + _MARGIN

    @property
    def pitch(self) -> int:
        """From one row of cells to the next."""
        return self.cell + _UNDER + self.lines * self.line + _ROW_GAP

    def place(self, number: int) -> tuple[int, int]:
        """The left upper corner of a cell."""
        row, column = divmod(number, self.columns)
        return _MARGIN + column * (self.cell + _GAP), _MARGIN + row * self.pitch


def check_sheet(path: Path, run: Path | None = None) -> None:
    """Make the folder of `path`. Raise CannotCreateError unless `path` can be written and is new, a contact sheet by
    this program, or a PNG in the folder of the `run` itself, where earlier versions wrote sheets without a mark."""
    prepare_folder(path.parent)
    unmarked = run is not None and path.suffix.lower() == ".png" and path.resolve().parent == run.resolve()
    marker = _PNG if unmarked else f"tEXt{_KEYWORD}\0".encode()
    check_may_write(path, marker, "contact sheet", "--sheet")


def write_sheet(
    path: Path, pictures: Iterable[SheetPicture], run: Path | None = None, *, overwrite: bool = True
) -> int:
    """Write a contact sheet of `pictures` in their order to `path`, and return how many it shows; of none no sheet is
    written. `overwrite`: in place of an earlier sheet.

    Many pictures get smaller cells. What finds no room even so, or cannot be read, is said in the log. Memory: four
    bytes a pixel of the sheet, the file, and one picture. Raises as `check_sheet` and `write_exact` do.
    """
    check_sheet(path, run)
    source = iter(pictures)
    shown_ones = list(itertools.islice(source, MAX_PICTURES))
    if not shown_ones:
        _log.info("there is no picture for a contact sheet; none is written")
        return 0
    sheet, unreadable = _drawn(shown_ones)
    write_exact(path, encode_image(sheet, {_KEYWORD: __version__}), overwrite=overwrite)
    if next(source, None):
        _log.warning("%s shows only the first %d pictures; more find no room on it", shown(path), MAX_PICTURES)
    if unreadable:
        _log.warning("%s: %d pictures cannot be read and are shown as empty cells", shown(path), unreadable)
    return len(shown_ones)


def _drawn(pictures: list[SheetPicture]) -> tuple["Image.Image", int]:
    """The sheet, and how many of `pictures` could not be read."""
    from PIL import Image, ImageDraw

    grid = _grid(len(pictures))
    texts = [wrapped(caption, grid.cell, grid.font) for _, caption in pictures]
    grid = grid._replace(lines=max(map(len, texts)))
    sheet = Image.new("RGB", grid.size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    unreadable = 0
    for number, (entry, text) in enumerate(zip(pictures, texts, strict=True)):
        left, top = grid.place(number)
        for line, words in enumerate(text):
            draw.text((left, top + grid.cell + _UNDER + line * grid.line), words, fill=_INK, font=grid.font)
        try:
            picture = _fitted(entry.path, grid.cell)
        except LdmError as error:
            _log.debug("%s", error)
            unreadable += 1
            picture = Image.new("RGB", (grid.cell, grid.cell), _FAULT)
            middle = (grid.cell // 2, grid.cell // 2)
            ImageDraw.Draw(picture).text(middle, "cannot be read", fill=_INK, font=grid.font, anchor="mm")
        left, top = left + (grid.cell - picture.width) // 2, top + (grid.cell - picture.height) // 2
        sheet.paste(picture, (left, top))
        draw.rectangle((left, top, left + picture.width - 1, top + picture.height - 1), outline=_EDGE)
    return sheet, unreadable


def _grid(count: int) -> _Grid:
    """The layout for `count` pictures with the largest cells that let all of them in."""
    from PIL import ImageFont

    for cell in _CELLS:
        size = max(11, min(18, round(cell / 18)))
        grid = _Grid(1, 1, cell, ImageFont.load_default(size), round(size * 1.3), _MAX_LINES)
        columns = min(count, math.ceil(math.sqrt(count * _SHAPE * grid.pitch / (cell + _GAP))))
        grid = grid._replace(columns=columns, rows=math.ceil(count / columns))
        if math.prod(grid.size) <= MAX_PIXELS:
            break
    return grid


def _fitted(path: Path, cell: int) -> "Image.Image":
    """The file as RGB within a square of `cell`: shrunk smoothly, or enlarged by a whole factor so that small ones
    keep their pixels. Raises an LdmError where it cannot be read."""
    from PIL import Image

    with open_regular(path, PICTURES) as raw:
        try:
            with Image.open(io.BufferedReader(raw), formats=list(FORMATS)) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadDataError(f"{shown(path)} cannot be read: {printable(str(error))}.") from error
    factor = cell // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((cell, cell), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def wrapped(text: str, width: int, font: "_Font") -> list[str]:
    """`text` in up to three lines of `width` pixels, long words broken, what is cut off marked by …"""
    words = "".join(_drawable(char) for char in unicodedata.normalize("NFC", text[:_MAX_CAPTION])).split()
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


def _longest_start(text: str, width: int, font: "_Font") -> int:
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
