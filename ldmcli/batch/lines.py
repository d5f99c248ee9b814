"""The lines of a prompt file or of standard input: unpacked, decoded and hashed on the way, in bounded memory."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldmcli.disk.opening import bad_file, open_regular
from ldmcli.errors import MissingInputError, StorageError, printable

MAX_LINE_BYTES = 4 << 20
_CHUNK = 1 << 16
_GZIP = b"\x1f\x8b"
_BOM = "\ufeff"
_UTF16 = ("\udcff\udcfe", "\udcfe\udcff")  # its byte order marks, as bytes that are no UTF-8 are decoded here
_WANTED = ("", "name a prompt file, or - for standard input")
_STDIN = Path("standard input")  # what messages call it
_TOO_LONG = f"the row is longer than {MAX_LINE_BYTES >> 20} MiB; make it shorter."


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


class Lines(Iterable[Line]):
    """The lines of the file at `path`, or of standard input where it is None, each as soon as it is complete.

    Gzip is detected from its first bytes. Lines end in LF, CRLF or CR, the last one in any of them or nothing. Byte
    order marks are left out; one within a line ends it, as files without a last newline that were joined have it, and
    `joined` is the number of the first such line. In what the expression `quoted` finds, marks are text. A line that
    is not UTF-8, holds NUL or is longer than MAX_LINE_BYTES has a `problem`. Raises LdmError where the input cannot be
    read, at once where it is a file that cannot be opened.
    """

    def __init__(self, path: Path | None, quoted: str = "") -> None:
        self.name = path or _STDIN
        self.joined = 0
        self._hash = hashlib.sha256()
        self._size = 0
        if path is not None:
            with open_regular(path, _WANTED):
                pass
        self._marks = re.compile(f"{quoted}|{_BOM}" if quoted else _BOM)
        self._lines = self._read(path)

    def __iter__(self) -> Iterator[Line]:
        return self._lines

    def digest(self) -> Digest:
        """Of the bytes read so far: at the end, of all."""
        return Digest(self._hash.hexdigest(), self._size)

    def _note(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self._size += len(chunk)

    def _read(self, path: Path | None) -> Iterator[Line]:
        with _opened(path) as content:
            noted: Any = _Noted(content, self._note)
            text = io.TextIOWrapper(noted, "utf-8", "surrogateescape", newline="")
            number = 0
            while line := text.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES and not line.endswith(("\n", "\r")):
                    yield Line(number, "", _TOO_LONG)
                    while line and not line.endswith(("\n", "\r")):
                        line = text.readline(_CHUNK)
                elif line.isascii() and "\0" not in line:
                    yield Line(number, line, "")
                else:
                    yield from self._examined(number, line)

    def _examined(self, number: int, text: str) -> Iterator[Line]:
        """The line without byte order marks, which may leave several."""
        if number == 1 and text.startswith(_UTF16):
            raise bad_file(self.name, "is UTF-16 text", "save it as UTF-8, or convert it: iconv -f utf-16 -t utf-8")
        marks = [mark.start() for mark in self._marks.finditer(text) if mark[0] == _BOM] if _BOM in text else []
        parts = [text[start:end] for start, end in zip([0, *(mark + 1 for mark in marks)], [*marks, None], strict=True)]
        if sum(bool(part.strip()) for part in parts) > 1:
            self.joined = self.joined or number
        for part in filter(None, parts):
            yield Line(number, *_decoded(part))


class _Noted(io.BufferedIOBase):
    """A stream of bytes whose chunks are noted as they are read."""

    def __init__(self, content: io.BufferedIOBase, note: Callable[[bytes], None]) -> None:
        self._content, self._note = content, note

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1) -> bytes:
        chunk = self._content.read1(_CHUNK if size < 0 else size)
        self._note(chunk)
        return chunk


def joined_hint(line: int) -> str:
    """The remark on a byte order mark within a line."""
    return f"line {line} holds a byte order mark, taken as the end of one file and the beginning of the next"


def continues(path: Path, before: Digest) -> bool:
    """Whether the file begins with what `before` was taken of, and a line ends there: if so, rows were only added."""
    hashed, left, last = hashlib.sha256(), before.size, b""
    with _opened(path) as content:
        while left and (chunk := content.read1(min(left, _CHUNK))):
            hashed.update(chunk)
            left -= len(chunk)
            last = chunk[-1:]
        same = not left and hashed.hexdigest() == before.sha256
        return same and (last in b"\r\n" or content.read1(1) in b"\r\n")  # nothing is in it too


def _decoded(text: str) -> tuple[str, str]:
    """The text as it may be passed on, and what is wrong with it."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raw = text.encode(errors="surrogateescape")
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            byte = f"byte {raw[error.start]:#04x} at {error.start}"
            cure = "save the file as UTF-8, or convert it: iconv -f cp1252 -t utf-8"
            return raw.decode(errors="replace"), f"the row is not UTF-8 text ({byte}); {cure}."
    if len(raw) > MAX_LINE_BYTES:
        return "", _TOO_LONG
    return text, "the row holds a NUL character; remove it, or save the file as UTF-8." if "\0" in text else ""


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[io.BufferedIOBase]:
    """The bytes, decompressed where they are gzip."""
    name = path or _STDIN
    with open_regular(path, _WANTED) if path else _standard_input() as raw, contextlib.ExitStack() as stack:
        content = io.BufferedReader(raw, _CHUNK)
        stack.callback(content.detach)  # the file is not its own to close
        try:
            yield gzip.GzipFile(fileobj=content) if content.peek(2)[:2] in (_GZIP, _GZIP[:1]) else content
        except EOFError:
            raise bad_file(name, "is cut off: its gzip data has no end", "get it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise bad_file(name, f"is damaged: {error}", "get it again") from None


@contextlib.contextmanager
def _standard_input() -> Iterator[io.FileIO]:
    """Past Python's buffer, whose lock a thread that waits here would hold when the program ends."""
    if sys.stdin is None:
        raise MissingInputError("standard input is closed; name a prompt file.")
    try:
        with io.FileIO(sys.stdin.fileno(), closefd=False) as raw:
            yield raw
    except OSError as error:
        raise StorageError(f"reading standard input failed: {printable(str(error))}.") from None
