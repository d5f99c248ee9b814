"""Delimited text as records: quoted fields that may span lines, and quotes that mean themselves."""

import csv
import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from ldmcli.batch.fields import column_name
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


def delimiter_of(header: str, prompt: str) -> str:
    """What separates the columns of this header: what stands outside its quotes and gives it a column for prompts, a
    comma before others (in much of Europe spreadsheets write semicolons)."""
    outside = re.sub(r'"[^"]*"?', "", header)
    there = [delimiter for delimiter in _DELIMITERS if delimiter in outside] or [_DELIMITERS[0]]
    for delimiter in there:
        if column_name(prompt) in {column_name(title.strip().strip('"')) for title in header.split(delimiter)}:
            return delimiter
    return there[0]


def records(header: Line, rest: Iterator[Line], delimiter: str) -> Iterator[Record]:
    """The records of these lines, the header's first, one at a time and reading no further than its end.

    A record whose quotes do not match is wrong alone: reading goes on at the line after its first. In TSV, which many
    write without any quoting, such a line is split at its tabs and its quotes are text.
    """
    lines = _Lines(header, rest)
    width = 0
    for line in lines:
        literal = [] if line.problem or not line.text.strip() else line.text.rstrip("\r\n").split(delimiter)
        if line.problem == "" and '"' not in line.text:
            record = Record(line.number, literal)
        else:
            record = lines.quoted(line, delimiter)
            unlike = record.problem or width not in (0, len(record.cells))
            if delimiter == "\t" and literal and unlike and width in (0, len(literal)):
                lines.put_back()
                record = Record(line.number, literal)
        width = width or len(record.cells)
        yield record


class _Lines(Iterator[Line]):
    """Lines, of which those that turn out not to belong to a record can be put back."""

    def __init__(self, header: Line, rest: Iterator[Line]) -> None:
        self._waiting = deque([header])
        self._rest = rest
        self._taken: list[Line] = []  # by the last record, without its first

    def __next__(self) -> Line:
        return self._waiting.popleft() if self._waiting else next(self._rest)

    def put_back(self) -> None:
        self._waiting.extendleft(reversed(self._taken))
        self._taken.clear()

    def quoted(self, line: Line, delimiter: str) -> Record:
        """The record that begins with this line. Blanks before a quote are no text, where they can be left out."""
        blanks = re.search(rf'(?:^|{re.escape(delimiter)}) +"', line.text) is not None
        self._taken.clear()
        for skip in (True, False) if blanks else (False,):
            self.put_back()
            before = csv.field_size_limit(2 * MAX_LINE_BYTES)  # of the whole process, so it is put back
            wrong = ""
            cells: list[str] = []
            try:
                cells = next(csv.reader(self._texts(line), delimiter=delimiter, strict=True, skipinitialspace=skip))
                break
            except csv.Error as error:
                wrong = f"the row's quotes do not match: {printable(str(error))}."
            finally:
                csv.field_size_limit(before)
        problem = next((one.problem for one in (line, *self._taken) if one.problem), "") or wrong
        if wrong:
            self.put_back()
        return Record(line.number, [] if problem else cells, problem)

    def _texts(self, line: Line) -> Iterator[str]:
        size = len(line.text)
        yield line.text
        while size <= MAX_LINE_BYTES and len(self._taken) < _MAX_LINES - 1:
            more = next(self, None)
            if more is None:
                return
            self._taken.append(more)
            size += len(more.text)
            yield more.text
        raise csv.Error("a quote opens and is not closed within 1000 lines and 4 MiB")
