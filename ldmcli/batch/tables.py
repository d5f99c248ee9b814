"""Delimited text as records: quoted fields that may span lines, and quotes that mean themselves."""

import csv
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from ldmcli.batch.lines import MAX_LINE_BYTES, Line
from ldmcli.errors import printable

_MAX_LINES = 1000  # of one record: a quote that never closes must not take the whole file with it
_DELIMITERS = ",;\t|"


class Record(NamedTuple):
    """The cells of one record and the line it begins on, or what is wrong with it."""

    line: int
    cells: list[str]
    problem: str = ""

    @property
    def blank(self) -> bool:
        """An empty line, or one of delimiters alone, as spreadsheets leave them behind; a quoted nothing is a cell."""
        return not self.problem and not (len(self.cells) == 1 or any(cell.strip() for cell in self.cells))


def delimiter_of(header: str) -> str:
    """What separates the columns of this header: a comma where it has one, else what else is usual (in much of Europe
    spreadsheets write semicolons)."""
    return next((delimiter for delimiter in _DELIMITERS if delimiter in header), _DELIMITERS[0])


def records(header: Line, rest: Iterator[Line], delimiter: str) -> Iterator[Record]:
    """The records of these lines, the header's first, one at a time and reading no further than its end.

    A record whose quotes do not match is wrong alone: reading goes on at the line after its first. In TSV, which many
    write without any quoting, such a line is split at its tabs and its quotes are text.
    """
    pushed = deque([header])
    width = 0
    while line := pushed.popleft() if pushed else next(rest, None):
        if line.problem == "" and '"' not in line.text:
            record = Record(line.number, line.text.rstrip("\r\n").split(delimiter) if line.text.strip() else [])
        else:
            record = _quoted(line, pushed, rest, delimiter, width)
        width = width or len(record.cells)
        yield record


def _quoted(line: Line, pushed: deque[Line], rest: Iterator[Line], delimiter: str, width: int) -> Record:
    """The record that begins with this line; lines that turn out not to be part of it go to the front of `pushed`."""
    taken = [line]
    size = len(line.text)

    def text() -> Iterator[str]:
        nonlocal size
        yield line.text
        while size <= MAX_LINE_BYTES and len(taken) < _MAX_LINES:
            more = pushed.popleft() if pushed else next(rest, None)
            if more is None:
                return
            taken.append(more)
            size += len(more.text)
            yield more.text
        raise csv.Error("a quote opens and is not closed within 1000 lines and 4 MiB")

    before = csv.field_size_limit(2 * MAX_LINE_BYTES)  # of the whole process, so it is put back
    try:
        cells, wrong = next(csv.reader(text(), delimiter=delimiter, strict=True)), ""
    except csv.Error as error:
        cells, wrong = [], f"the row's quotes do not match: {printable(str(error))}."
    finally:
        csv.field_size_limit(before)
    literal = line.text.rstrip("\r\n").split(delimiter)
    if delimiter == "\t" and (wrong or width not in (0, len(cells))) and (width in (0, len(literal))):
        cells, wrong, again = literal, "", True
    else:
        again = bool(wrong)
    if again:
        pushed.extendleft(reversed(taken[1:]))
        del taken[1:]
    problem = next((one.problem for one in taken if one.problem), "") or wrong
    return Record(line.number, [] if problem else cells, problem)
