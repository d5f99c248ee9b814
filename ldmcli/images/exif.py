"""The text in the EXIF data of JPEG and WebP files: written by Pillow, read bounded in memory and time without it.

AUTOMATIC1111's text is where it puts it, in UserComment as UTF-16 in big-endian order; our record in MakerNote, which
viewers do not show. Format: CIPA DC-008 (Exif 2.32); https://developers.google.com/speed/webp/docs/riff_container.
"""

import itertools
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from ldmcli.disk.opening import PICTURES, open_regular
from ldmcli.errors import BadDataError, printable
from ldmcli.images.png_text import MAX_TEXT_BYTES, latin_text

PARAMETERS_KEYWORD, RECORD_KEYWORD = "parameters", "ldmcli"
EXIF_KEYWORDS = (PARAMETERS_KEYWORD, RECORD_KEYWORD)  # what EXIF has a place for; the one to spare first
_EXIF_IFD, _MAKER_NOTE, _USER_COMMENT = 0x8769, 0x927C, 0x9286
_CAMERA = range(0x0110, 0x0100, -1)  # Model, Make, ImageDescription, and what ComfyUI counts down to
_KEYED = re.compile(r"(?:(\w{1,40}):)?\s*(\{.*)", re.DOTALL)
_UNDEFINED, _ASCII, _BYTE = 7, 2, 1  # types of one byte a value
_UNICODE, _OURS, _PREFIX = b"UNICODE\0", b"ldmcli\0", b"Exif\0\0"
_ALONE = {0x01, *range(0xD0, 0xD8)}  # JPEG's markers without a segment
_MAX_CHUNKS = 1 << 14


def exif_with(text: Mapping[str, str]) -> bytes:
    """EXIF data with the items of `text` that are EXIF_KEYWORDS; nothing for none. Raises ValueError for a lone
    surrogate."""
    from PIL import Image

    exif = Image.Exif()
    exif.endian = ">"
    tags = exif.get_ifd(_EXIF_IFD)
    if PARAMETERS_KEYWORD in text:
        tags[_USER_COMMENT] = _UNICODE + text[PARAMETERS_KEYWORD].encode("utf-16-be")
    if RECORD_KEYWORD in text:
        tags[_MAKER_NOTE] = _OURS + text[RECORD_KEYWORD].encode()
    return exif.tobytes() if tags else b""


def iterate_exif_text(path: Path) -> Iterator[tuple[str, str]]:
    """Each (keyword, text) of EXIF_KEYWORDS that a JPEG or WebP file holds, our record first; then the JSON that other
    programs keep in tags for the camera, ComfyUI's with its keyword before it, any other as PARAMETERS_KEYWORD.

    Raises MissingInputError when there is no such file or it cannot be opened, BadDataError when it is none of both or
    is damaged or cut off before its EXIF data, StorageError when reading fails.
    """
    shown = printable(str(path))
    try:
        with open_regular(path, PICTURES) as file:
            exif = _found(file)
        tags = _tags(exif.removeprefix(_PREFIX)) if exif else {}
        if tags.get(_MAKER_NOTE, b"").startswith(_OURS):
            yield RECORD_KEYWORD, tags[_MAKER_NOTE][len(_OURS) :].decode()
        if _USER_COMMENT in tags:
            yield PARAMETERS_KEYWORD, _comment(tags[_USER_COMMENT])
        for tag in _CAMERA:
            if found := _KEYED.match(latin_text(tags.get(tag, b"").rstrip(b"\0"))):
                yield found[1] or PARAMETERS_KEYWORD, found[2]
    except struct.error:
        raise BadDataError(f"{shown} is cut off or damaged: its EXIF data ends too early.") from None
    except UnicodeDecodeError as error:
        raise BadDataError(f"{shown} has EXIF text that is broken: {error}.") from None
    except _DamageError as error:
        raise BadDataError(f"{shown} {error}.") from None


class _DamageError(Exception):
    """What is wrong with a file, so that nothing more can be read from it."""


def _found(file: BinaryIO) -> bytes:
    """The file's EXIF data, the rest skipped unread; nothing where it has none. Raises _DamageError."""
    size, start = os.fstat(file.fileno()).st_size, file.read(12)
    if start[:2] == b"\xff\xd8":
        return _of_jpeg(file, size)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return _of_webp(file, size)
    raise _DamageError(f"is neither a JPEG nor a WebP file: it {f'begins with {start!r}' if start else 'is empty'}")


def _of_jpeg(file: BinaryIO, size: int) -> bytes:
    file.seek(2)
    for _ in range(_MAX_CHUNKS):
        marker = file.read(2)
        while marker == b"\xff\xff":  # any number of fill bytes may stand before a marker
            marker = b"\xff" + file.read(1)
        if len(marker) < 2:
            raise _DamageError("is cut off: it ends before the pixels of a JPEG")
        if marker[0] != 0xFF:
            raise _DamageError(f"is a damaged JPEG: {marker!r} is no marker")
        if marker[1] in _ALONE:
            continue
        if marker[1] in (0xD9, 0xDA):  # the end, or pixels, after which nobody puts EXIF data
            return b""
        length = int.from_bytes(file.read(2), "big")
        end = file.tell() + length - 2
        if length < 2 or end > size:
            raise _DamageError("is cut off or damaged: a segment of it runs past its end")
        if marker[1] == 0xE1 and (body := file.read(length - 2)).startswith(_PREFIX):
            return body
        file.seek(end)
    raise _DamageError(f"is not accepted: it has more than {_MAX_CHUNKS} segments")


def _of_webp(file: BinaryIO, size: int) -> bytes:
    for _ in range(_MAX_CHUNKS):
        header = file.read(8)
        if not header:
            return b""
        kind, length = struct.unpack("<4sI", header)
        end = file.tell() + length
        if end > size:
            raise _DamageError("is cut off or damaged: a chunk of it runs past its end")
        if kind == b"EXIF":
            if length > MAX_TEXT_BYTES:
                raise _DamageError(f"is not accepted: it holds more than {MAX_TEXT_BYTES >> 20} MiB of text")
            return file.read(length)
        file.seek(end + length % 2)
    raise _DamageError(f"is not accepted: it has more than {_MAX_CHUNKS} chunks")


def _tags(exif: bytes) -> dict[int, bytes]:
    """The values of UserComment, MakerNote and _CAMERA, as far as they are there. Raises struct.error, _DamageError."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        raise _DamageError("has EXIF data without a TIFF header")
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    first = list(_entries(exif, order, start))
    links = [value for tag, _, _, value in first if tag == _EXIF_IFD]
    own = itertools.chain.from_iterable(_entries(exif, order, link) for link in links[:1])
    wanted = [entry for entry in own if entry[0] in (_MAKER_NOTE, _USER_COMMENT)]
    wanted += [entry for entry in first if entry[0] in _CAMERA]
    found: dict[int, bytes] = {}
    for tag, kind, count, value in wanted:
        if kind in (_UNDEFINED, _ASCII, _BYTE) and tag not in found:
            data = exif[value : value + count] if count > 4 else b""  # what is that short is no text
            if len(data) < count > 4:
                raise _DamageError("is cut off or damaged: its EXIF text runs past its end")
            found[tag] = data
            if sum(map(len, found.values())) > MAX_TEXT_BYTES:
                raise _DamageError(f"is not accepted: it holds more than {MAX_TEXT_BYTES >> 20} MiB of text")
    return found


def _entries(exif: bytes, order: str, start: int) -> Iterator[tuple[int, int, int, int]]:
    """Tag, type, count and value or offset of each entry of a directory."""
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    for i in range(count):
        yield struct.unpack_from(f"{order}HHII", exif, start + 2 + 12 * i)


def _comment(value: bytes) -> str:
    """The text of a UserComment by the character code that it begins with; of UTF-16 in either order, since programs
    differ, and none says which."""
    code, text = value[:8], value[8:]
    if code != _UNICODE:
        return latin_text(text if code.rstrip(b"\0") in (b"", b"ASCII") else value).rstrip("\0")
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return text.decode("utf-16")
    little = text[1::2].count(0) > text[::2].count(0)  # most of any infotext is ASCII
    return text.decode("utf-16-le" if little else "utf-16-be")
