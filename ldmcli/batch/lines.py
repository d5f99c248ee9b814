"""The lines of a prompt file or of standard input: unpacked, decoded and hashed on the way, in bounded memory."""

import dataclasses
import hashlib
import os
import sys
import zlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ldmcli.disk.opening import bad_file, open_regular
from ldmcli.errors import BadDataError, MissingInputError, StorageError, printable

MAX_LINE_BYTES = 4 << 20
_CHUNK = 1 << 16
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_WANTED = ("", "name a prompt file, or - for standard input")
_STDIN = Path("standard input")  # what messages call it


class Line(NamedTuple):
    """One line: its number from 1, its text with the line's end, and what is wrong with it ("" where nothing is)."""

    number: int
    text: str
    problem: str


@dataclasses.dataclass(frozen=True)
class Digest:
    """What an input's content is known by: the hash and the number of its bytes, decompressed."""

    sha256: str
    size: int


class Lines(Iterator[Line]):
    """The lines of the file at `path`, or of standard input where it is None, each as soon as it is complete.

    Gzip is told by its first bytes. Lines end in LF, CRLF or CR, the last one in any of them or nothing; a byte order
    mark is left out. A line that is no UTF-8, holds NUL or is longer than MAX_LINE_BYTES has a `problem`. Raises
    LdmError where the input cannot be read, at once where it is a file that cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self.name = path or _STDIN
        self._hash = hashlib.sha256()
        self._size = 0
        if path is not None:
            with open_regular(path, _WANTED):
                pass
        self._lines = self._decoded(_split(_whole_ends(self._hashed(_chunks(path)))))

    def __iter__(self) -> Iterator[Line]:
        return self._lines

    def __next__(self) -> Line:
        return next(self._lines)

    def close(self) -> None:
        """Close the file; there are no more lines."""
        self._lines.close()

    def digest(self) -> Digest:
        """Of the bytes read so far: at the end, of all."""
        return Digest(self._hash.hexdigest(), self._size)

    def _hashed(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._hash.update(chunk)
            self._size += len(chunk)
            yield chunk

    def _decoded(self, lines: Iterator[bytes | None]) -> Generator[Line]:
        for number, raw in enumerate(lines, 1):
            if raw is None:
                yield Line(number, "", f"the row is longer than {MAX_LINE_BYTES >> 20} MiB; make it shorter.")
                continue
            if number == 1:
                if raw.startswith(_UTF16):
                    raise bad_file(self.name, "is UTF-16 text", "save it as UTF-8")
                raw = raw.removeprefix(_BOM)
            try:
                text, problem = raw.decode(), ""
            except UnicodeDecodeError as error:
                byte = f"byte {raw[error.start]:#04x} at {error.start}"
                text, problem = raw.decode(errors="replace"), f"the row is not UTF-8 text ({byte}); save it as UTF-8."
            if b"\0" in raw:
                problem = problem or "the row holds a NUL character; remove it."
            yield Line(number, text, problem)


def digest_of(path: Path, size: int | None = None) -> Digest:
    """The digest of a prompt file, or of its first `size` bytes (fewer where it is shorter), decompressed."""
    hashed, left = hashlib.sha256(), size
    total = 0
    for chunk in _chunks(path):
        chunk = chunk[:left]
        hashed.update(chunk)
        total += len(chunk)
        if left is not None:
            left -= len(chunk)
            if left == 0:
                break
    return Digest(hashed.hexdigest(), total)


def continues(path: Path, before: Digest) -> bool:
    """Whether the file begins with what `before` was taken of, and a line ends there: if so, rows were only added."""
    if digest_of(path, before.size) != before:
        return False
    seen, last = 0, b"\n"
    for chunk in _chunks(path):
        end = before.size - seen  # where in this chunk the old content ends
        if 0 < end <= len(chunk):
            last = chunk[end - 1 : end]
        if 0 <= end < len(chunk):
            return last in b"\r\n" or chunk[end : end + 1] in b"\r\n"
        seen += len(chunk)
    return True


def _chunks(path: Path | None) -> Iterator[bytes]:
    """The bytes, decompressed where they are gzip."""
    packed = _stdin() if path is None else _file(path)
    start = b""
    for chunk in packed:
        start += chunk
        if len(start) >= len(_GZIP):
            break
    if start.startswith(_GZIP):
        yield from _unpacked(start, packed, path or _STDIN)
    elif start:
        yield start
        yield from packed


def _file(path: Path) -> Iterator[bytes]:
    with open_regular(path, _WANTED) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _stdin() -> Iterator[bytes]:
    if sys.stdin is None:
        raise MissingInputError("standard input is closed; name a prompt file.")
    try:
        # Past Python's buffer, whose lock a thread that waits here would hold when the program ends.
        while chunk := os.read(sys.stdin.fileno(), _CHUNK):
            yield chunk
    except OSError as error:
        raise StorageError(f"reading standard input failed: {printable(str(error))}.") from None


def _unpacked(start: bytes, packed: Iterator[bytes], name: Path) -> Iterator[bytes]:
    """Gunzip, a chunk at a time. One file may be several gzip streams in a row, with zeros between and behind."""
    unzip = zlib.decompressobj(31)
    while True:
        if unzip.eof and (start := start.lstrip(b"\0")):
            unzip = zlib.decompressobj(31)
        data = b""
        if not unzip.eof:
            try:
                data = unzip.decompress(start, _CHUNK)
            except zlib.error as error:
                raise _damaged(name, f"is damaged: {error}") from None
            start = unzip.unused_data if unzip.eof else unzip.unconsumed_tail
        if data:
            yield data
        if start or (len(data) == _CHUNK and not unzip.eof):
            continue
        start = next(packed, b"")
        if not start:
            break
    if not unzip.eof:
        raise _damaged(name, "is cut off: its gzip data has no end")


def _damaged(name: Path, cause: str) -> BadDataError:
    return bad_file(name, cause, "get it again")


def _whole_ends(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks cut otherwise, so that none ends between CR and LF."""
    carried = b""
    for chunk in chunks:
        chunk = carried + chunk
        carried = b"\r" if chunk.endswith(b"\r") else b""
        if whole := chunk.removesuffix(carried):
            yield whole
    if carried:
        yield carried


def _split(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """The lines with their ends; None for one that is too long, as soon as it is."""
    held, skipping = bytearray(), False
    for chunk in chunks:
        for part in chunk.splitlines(keepends=True):
            ends = part.endswith((b"\n", b"\r"))
            if skipping:
                skipping = not ends
            elif len(held) + len(part) > MAX_LINE_BYTES:
                yield None
                held.clear()
                skipping = not ends
            elif not ends:
                held += part
            elif held:
                yield bytes(held + part)
                held.clear()
            else:
                yield part
    if held:
        yield bytes(held)
