"""Prompt files of every format as raw rows, one at a time: plain text, JSON lines, CSV and TSV."""

import dataclasses
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ldmcli.batch.fields import EXTRAS, IDS, PROMPT, as_fields, column_name, field_named, from_text, suspected
from ldmcli.batch.lines import Line, Lines, joined_hint
from ldmcli.batch.option_lines import READERS, looks_like
from ldmcli.batch.tables import Record, delimiter_of, records
from ldmcli.conditions import CONDITION_FIELDS
from ldmcli.disk.opening import missing, shown
from ldmcli.errors import BadDataError, UsageError, printable

FORMATS = ("txt", "jsonl", "csv", "tsv", *READERS)
_ALIASES = {"ndjson": "jsonl", "tab": "tsv"}
_LISTED = 20  # columns named in a message
_SEPARATOR = re.compile(r'"?sep=(.)"?[\s,;]*', re.IGNORECASE | re.DOTALL)  # the first line of a table, to Excel
_QUOTED = {
    "txt": "",
    **dict.fromkeys(READERS, ""),
    "jsonl": r'"(?:[^"\\]|\\.)*"?',
    "csv": '"[^"]*"?',
    "tsv": '"[^"]*"?',
}
_Column = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class RawRow:
    """One row as it was written. `fields` are by the names of `fields.COLUMNS`, and `extra`, a dict of what else there
    was; None where the row cannot be read at all. `problem` says what is wrong with the row as a whole."""

    row: int  # counted from 1, without headers, comments and blank lines
    line: int  # the row's first, counted from 1
    fields: dict[str, Any] | None
    problem: str = ""


class RowReader(Iterable[RawRow]):
    """The rows of one input, once, in order. `hints` are remarks on what may be meant otherwise than it is read, all
    known after the last row."""

    def __init__(self, lines: Lines, kind: str, prompt_column: str | None) -> None:
        self.hints: list[str] = []
        self.digest = lines.digest  # of the decompressed bytes read so far: after the last row, of all
        self._hinted: set[str] = set()
        self._input, self._lines = lines, iter(lines)
        self._prompt_column = prompt_column
        parse = partial(_json_row, prompt_column=prompt_column) if kind == "jsonl" else self._text_row
        comments = kind in ("txt", "kohya")
        if kind in READERS:
            self._rows = self._rows_with_options(kind, comments=comments)
        else:
            self._rows = self._table(kind) if kind in ("csv", "tsv") else self._row_a_line(parse, comments=comments)

    def __iter__(self) -> Iterator[RawRow]:
        return self._rows

    def _filled(self, *, comments: bool) -> Iterator[Line]:
        """The lines that hold something; with `comments` none that begin with #."""
        for line in self._lines:
            if (line.problem or line.text.strip()) and not (comments and line.text.lstrip().startswith("#")):
                yield line

    def _rows_with_options(self, kind: str, *, comments: bool) -> Generator[RawRow]:
        row = 0
        for line in self._filled(comments=comments):
            for fields, problem in [(None, line.problem)] if line.problem else READERS[kind](line.text):
                row += 1
                yield RawRow(row, line.number, fields, problem)
        self._hint_joined()

    def _row_a_line(self, parse: Callable[[int, Line], RawRow], *, comments: bool) -> Generator[RawRow]:
        for row, line in enumerate(self._filled(comments=comments), 1):
            yield RawRow(row, line.number, None, line.problem) if line.problem else parse(row, line)
        self._hint_joined()

    def _text_row(self, row: int, line: Line) -> RawRow:
        if "--" in line.text and (known := looks_like(line.text)):
            self._hint("options", f"line {line.number} seems to hold options, and plain text has none: it is drawn as "
                       f"it stands; --format {known} reads them")  # fmt: skip
        elif line.text.startswith("--"):
            self._hint("options", f"line {line.number} begins with --, and plain text has no options: it is drawn as "
                       "it stands; JSON lines, CSV and TSV have fields for them")  # fmt: skip
        return RawRow(row, line.number, {PROMPT: line.text.rstrip("\r\n")})

    def _table(self, kind: str) -> Generator[RawRow]:
        """A header, then a row a record."""
        filled = (line for line in self._lines if line.problem or line.text.strip())
        header = next(filled, None)
        delimiter = "\t" if kind == "tsv" else ""
        if header and (named := _SEPARATOR.fullmatch(header.text)):
            delimiter, header = named[1], next(filled, None)
        if header is None:
            return
        delimiter = delimiter or delimiter_of(header.text, self._prompt_column or PROMPT)
        table = records(header, self._lines, delimiter)
        first = next(table)
        columns = self._columns(first)
        row = 0
        for record in table:
            if record.blank:
                continue
            if record.cells == first.cells:
                self._hint("header", f"line {record.line} repeats the header and is passed over")
                continue
            row += 1
            if record.problem:
                yield RawRow(row, record.line, None, record.problem)
            elif len(record.cells) != len(columns):
                have = f"{len(record.cells)} field{'s' if len(record.cells) != 1 else ''}"
                yield RawRow(row, record.line, None, f"the row has {have}, but the header has {len(columns)}.")
            else:
                yield _table_row(row, record, columns, decimal_comma=delimiter != ",")
        self._hint_joined()

    def _columns(self, header: Record) -> list[_Column]:
        """For each column the field, or "", and its title. Raises BadDataError where the header cannot be meant,
        UsageError where it has not the column asked for."""
        where = f"{shown(self._input.name)}, line {header.line}"
        if header.problem:
            raise BadDataError(f"{where}: {header.problem}")
        titles = [cell.strip() for cell in header.cells]
        prompt = _prompt_index(titles, self._prompt_column, where)
        columns: list[_Column] = []
        for i, title in enumerate(titles):
            field = PROMPT if i == prompt else field_named(title)
            if i != prompt and field in (PROMPT, *EXTRAS):
                field = ""
            columns.append((field, title or f"column {i + 1}"))
            if not field and (advice := suspected(title)):
                self.hints.append(f"column {printable(repr(title))} is no field of a request; {advice}")
        if any(field == IDS[0] for field, _ in columns):
            columns = [("" if field == IDS[1] else field, title) for field, title in columns]  # one is kept as it is
        names = [column_name(title) if field else title for field, title in columns]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise BadDataError(f"{where}: the header has column {printable(repr(twice[0]))} twice; rename one.")
        return columns

    def _hint_joined(self) -> None:
        if self._input.joined:
            self._hint("joined", joined_hint(self._input.joined))

    def _hint(self, kind: str, sentence: str) -> None:
        """Keep the remark, the first of its kind."""
        if kind not in self._hinted:
            self._hinted.add(kind)
            self.hints.append(sentence)


def open_rows(path: Path | None, *, format: str | None = None, prompt_column: str | None = None) -> RowReader:
    """The rows of a prompt file, or of standard input where `path` is None.

    `format` is one of FORMATS, by default what the name ends in; `prompt_column` the column (in JSON: the field) that
    holds the prompts. Raises UsageError where the format is not known, and LdmError, here or at a row, where the
    input cannot be read. A row that is wrong raises nothing.
    """
    kind = _format_of(path) if format is None else _ALIASES.get(format, format)
    if kind not in FORMATS:
        raise UsageError(f"format {printable(repr(format))} is not known; choose from {', '.join(FORMATS)}.")
    if prompt_column is not None and kind in ("txt", *READERS):
        raise UsageError("plain text has no columns; leave out --prompt-column, or give --format.")
    return RowReader(Lines(path, _QUOTED[kind]), kind, prompt_column)


def _format_of(path: Path | None) -> str:
    choice = f"give --format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    if path is None:
        raise UsageError(f"standard input has no name that gives its format; {choice}.")
    name = path.name.lower().removesuffix(".gz")
    ending = name.rpartition(".")[2] if "." in name else ""
    kind = _ALIASES.get(ending, ending)
    if kind not in FORMATS and not path.exists():
        raise missing(path)
    if kind not in FORMATS:
        raise UsageError(f"the name {printable(repr(path.name))} does not give the file's format; {choice}.")
    return kind


def _json_row(row: int, line: Line, prompt_column: str | None) -> RawRow:
    """The row of a JSON object; null fields are left out."""
    try:
        found = JSON.decode(line.text)
    except json.JSONDecodeError as error:  # its own text counts lines too, within the row
        return RawRow(row, line.number, None, f"the row is not valid JSON: {error.msg} at character {error.pos + 1}.")
    except (ValueError, RecursionError) as error:
        return RawRow(row, line.number, None, f"the row is not valid JSON: {printable(str(error))}.")
    if not isinstance(found, dict):
        cure = "write one object a line (jq -c '.[]' FILE)" if isinstance(found, list) else 'write {"prompt": "…"}'
        return RawRow(row, line.number, None, f"the row is not a JSON object; {cure}.")
    if prompt_column is not None and prompt_column != PROMPT:
        shadowed = found.pop(PROMPT, None)
        found[PROMPT] = found.pop(prompt_column, None)
        if shadowed is not None:
            found.setdefault(EXTRAS[0], {})
            if isinstance(found[EXTRAS[0]], dict):
                found[EXTRAS[0]].setdefault(PROMPT, shadowed)
    fields, problem = as_fields(
        (field_named(title) or title, title, value) for title, value in found.items() if value is not None
    )
    return RawRow(row, line.number, fields, problem)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these members; json alone would keep the last of two of one name and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"field {twice!r} is there twice")
    return found


JSON = json.JSONDecoder(object_pairs_hook=_once)  # one: to make it costs more than to read a row


def _table_row(row: int, record: Record, columns: list[_Column], *, decimal_comma: bool) -> RawRow:
    """The row of a record; an empty cell says nothing, save that a prompt is empty."""
    extra: dict[str, str] = {}
    given = []
    for (field, title), cell in zip(columns, record.cells, strict=True):
        if not field:
            extra[title] = cell
        elif field == PROMPT or cell.strip():
            given.append((field, title, from_text(field, cell, decimal_comma=decimal_comma)))
    fields, problem = as_fields(given)
    if extra:
        fields[EXTRAS[0]] = extra
    return RawRow(row, record.line, fields, problem)


def _prompt_index(titles: list[str], prompt_column: str | None, where: str) -> int:
    """Which column holds the prompts: the title that is meant exactly, else but for case, spaces and hyphens; -1 for
    none, where a column says what is drawn without."""
    wanted = PROMPT if prompt_column is None else prompt_column.strip()
    if wanted in titles:
        return titles.index(wanted)
    same = [i for i, title in enumerate(titles) if column_name(title) == column_name(wanted)]
    if len(same) == 1:
        return same[0]
    have = ", ".join(printable(repr(title), 60) for title in titles[:_LISTED]) + (" …" if len(titles) > _LISTED else "")
    if same:
        raise BadDataError(f"{where}: more than one column is called {printable(repr(wanted))}; rename one.")
    if prompt_column is None and {field_named(title) for title in titles} & set(CONDITION_FIELDS):
        return -1
    if prompt_column is None:
        raise BadDataError(f"{where}: no column is called prompt; name one of {have} with --prompt-column.")
    raise UsageError(f"{where}: no column is called {printable(repr(wanted))}; the header has {have}.")
