"""Prompts from arguments and from standard input, one at a time."""

import sys
from collections.abc import Iterator, Sequence

from ldmcli.errors import BadDataError
from ldmcli.spec import MAX_PROMPT_BYTES

STDIN = "-"


def read_prompts(arguments: Sequence[str]) -> Iterator[str]:
    """The prompts in order; `-` stands for the lines of standard input, each yielded as soon as it is read.

    Lines may end in CRLF or lack an end; blank ones are skipped, and a byte order mark is. Raises BadDataError naming
    the line that is no UTF-8, holds a NUL or is longer than any prompt may be.
    """
    for argument in arguments:
        if argument == STDIN:
            yield from _lines()
        else:
            yield argument


def _lines() -> Iterator[str]:
    number = 0
    while line := sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 2):
        number += 1
        if len(line.rstrip(b"\r\n")) > MAX_PROMPT_BYTES:
            raise BadDataError(f"standard input, line {number}: longer than {MAX_PROMPT_BYTES} bytes.")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise BadDataError(
                f"standard input, line {number}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})."
            ) from None
        if "\0" in text:
            raise BadDataError(f"standard input, line {number}: holds a NUL character.")
        if text.strip():
            yield text.rstrip("\r\n")
