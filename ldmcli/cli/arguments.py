"""What arguments name, one at a time: files, prompts, and those or a picture from standard input."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import click

from ldmcli.errors import BadDataError, LdmError

STDIN = "-"
_File = TypeVar("_File")
MAX_PICTURE = 1 << 28  # bytes
_log = logging.getLogger(__name__)


def read_prompts(arguments: Sequence[str]) -> Iterator[str]:
    """The prompts in order; `-` stands for the lines of standard input, each yielded as soon as it is read.

    Lines are read as those of a prompt file: in any ending, maybe gzip, without byte order marks; blank ones are
    skipped. Raises BadDataError naming the line that is not UTF-8, holds a NUL or is too long.
    """
    for argument in arguments:
        if argument == STDIN:
            yield from _lines()
        else:
            yield argument


def each_file(
    context: click.Context,
    files: Sequence[_File],
    work: Callable[[_File], object],
    passed: type[LdmError] = LdmError,
) -> None:
    """Do `work` for each file and exit: an error of the kind `passed` is said, and the others are done all the same;
    the code is that of the first that failed."""
    codes = []
    for file in files:
        try:
            work(file)
        except passed as error:
            if len(files) == 1:
                raise
            _log.error("%s", error)
            codes.append(error.exit_code)
    context.exit(codes[0] if codes else 0)


def picture_from_stdin() -> bytes:
    """What standard input has, all of it. Raises BadDataError where that is nothing, or too much for a picture."""
    data = sys.stdin.buffer.read(MAX_PICTURE + 1)
    if not data:
        raise BadDataError("standard input is empty, and a picture was to come from it.")
    if len(data) > MAX_PICTURE:
        raise BadDataError(f"standard input has more than {MAX_PICTURE >> 20} MiB, too much for a picture.")
    return data


def _lines() -> Iterator[str]:
    from ldmcli.batch.lines import Lines, joined_hint
    from ldmcli.batch.option_lines import looks_like

    lines = Lines(None)
    hinted = False
    for line in lines:
        if not hinted and "--" in line.text and (known := looks_like(line.text)):
            hinted = True
            _log.warning("line %d seems to hold options: ldm batch - --format %s reads them", line.number, known)
        if line.problem:
            raise BadDataError(f"standard input, line {line.number}: {line.problem}")
        if line.text.strip():
            yield line.text.rstrip("\r\n")
    if lines.joined:
        _log.warning("%s", joined_hint(lines.joined))
