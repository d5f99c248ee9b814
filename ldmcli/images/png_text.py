"""The text of any PNG file, bounded in memory and time, without Pillow. Format: https://www.w3.org/TR/png-3/."""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ldmcli.checks import MAX_PROMPT_BYTES
from ldmcli.disk.opening import PICTURES, open_regular
from ldmcli.errors import BadDataError, printable

MAX_TEXT_BYTES = 16 * MAX_PROMPT_BYTES  # of one picture: two full prompts, 6 bytes of JSON a byte, and room
EMBEDDING_KEYWORD = "sd-ti-embedding"  # A1111's, of a picture that carries an embedding
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 1 << 17
_MAX_BROKEN = 16  # text chunks passed over; each may unpack to MAX_TEXT_BYTES before it shows
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")


def iterate_text(path: Path) -> Iterator[tuple[str, str]]:
    """Each (keyword, text) of a PNG's tEXt, zTXt and iTXt chunks in file order, the rest skipped unread.

    Bounded in memory and time: MAX_TEXT_BYTES for all text together, decompressed or not. Text that is broken or too
    large is passed over and reported at the end: whoever finds what they look for before need not know. Raises
    MissingInputError when there is no such file or it cannot be opened, BadDataError when it is no PNG, is damaged or
    is cut off before its end, StorageError when reading fails.
    """
    shown = printable(str(path))
    too_much = f"is not accepted: it holds more than {MAX_TEXT_BYTES >> 20} MiB of text"
    left = MAX_TEXT_BYTES
    faults: list[str] = []
    try:
        for kind, length, file in _text_chunks(path):
            if length > MAX_TEXT_BYTES:
                faults.append(too_much)
                continue
            body = file.read(length)
            try:
                if file.read(4) != struct.pack(">I", zlib.crc32(kind + body)):
                    raise ValueError("it has a wrong checksum")
                keyword, text = _decoded(kind, body, left)
            except ValueError as error:
                faults.append(f"has a broken {kind.decode()} chunk: {error}")
            else:
                left -= max(len(body), len(text))
                if left >= 0:
                    yield keyword, text
            if left < 0 or len(faults) > _MAX_BROKEN:
                faults.append(too_much)
                break
    except _DamageError as error:
        faults.append(str(error))
    if faults:
        raise BadDataError(f"{shown} {faults[0]}.")


def carries_embedding(path: Path) -> bool:
    """Whether a picture is a sound PNG that holds an embedding, as A1111 writes them. Raises as `open_regular` does."""
    try:
        return any(keyword == EMBEDDING_KEYWORD for keyword, _ in iterate_text(path))
    except BadDataError:
        return False


def latin_text(data: bytes) -> str:
    """The text of a tEXt or zTXt chunk: by the format Latin-1; but UTF-8, which many programs write, where it is valid,
    as Latin-1 of any length hardly ever is."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


class _DamageError(Exception):
    """What is wrong with a file, so that nothing more can be read from it."""


def _text_chunks(path: Path) -> Iterator[tuple[bytes, int, BinaryIO]]:
    """(type, length, file) of each text chunk that lies whole inside the file, which stands at its first byte. Raises
    _DamageError."""
    with open_regular(path, PICTURES) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(_SIGNATURE))
        if start != _SIGNATURE:
            raise _DamageError(f"is no PNG, JPEG or WebP file: it {f'begins with {start!r}' if start else 'is empty'}")
        for _ in range(_MAX_CHUNKS):
            header = file.read(8)
            if len(header) < 8:
                raise _DamageError("is cut off: it ends before the last chunk of a PNG")
            length, kind = struct.unpack(">I4s", header)
            end = file.tell() + length + 4
            if not kind.isalpha():
                raise _DamageError(f"is a damaged PNG: {kind!r} is no chunk type")
            if end > size:
                raise _DamageError(f"is cut off or damaged: its {kind.decode()} chunk runs past its end")
            if kind == b"IEND":
                return
            if kind in _TEXT_CHUNKS:
                yield kind, length, file
            file.seek(end)
    raise _DamageError(f"is not accepted: it has more than {_MAX_CHUNKS} chunks")


def _decoded(kind: bytes, body: bytes, limit: int) -> tuple[str, str]:
    """(keyword, text) of a text chunk. Raises ValueError when malformed or over `limit` bytes unpacked."""
    key, separator, rest = body.partition(b"\0")
    if not separator:
        raise ValueError("it has no keyword")
    keyword = key.decode("latin-1")
    if kind == b"tEXt":
        return keyword, latin_text(rest)
    if kind == b"zTXt":
        return keyword, latin_text(_inflated(rest[:1], rest[1:], limit))
    fields = rest[2:].split(b"\0", 2)  # after flag and method: language, translated keyword, text
    if len(fields) < 3:
        raise ValueError("fields are missing")
    packed = rest[0] != 0
    return keyword, (_inflated(rest[1:2], fields[2], limit) if packed else fields[2]).decode("utf-8")


def _inflated(method: bytes, data: bytes, limit: int) -> bytes:
    """`data` decompressed. Raises ValueError when it is broken or gives more than `limit` bytes."""
    if method != b"\0":
        raise ValueError("its compression method is unknown")
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(text) > limit:
        raise ValueError(f"it unpacks to more than {limit} bytes")
    if not inflater.eof:
        raise ValueError("its compressed text is cut off")
    return text
