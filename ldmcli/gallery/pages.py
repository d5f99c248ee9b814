"""A folder of pictures as static HTML pages: from the manifest of a batch run, or from what the pictures carry.

What is known of each picture waits in a database that SQLite keeps on disk and deletes by itself, so that a million of
them, written by many workers in any order, come out sorted and single in constant memory.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ldmcli.disk.opening import shown
from ldmcli.disk.writing import check_may_write, is_marked, prepare_folder, write_exact
from ldmcli.errors import LdmError, MissingInputError, StorageError, printable
from ldmcli.gallery.html import MARK, Card, Page, render
from ldmcli.gallery.redraw import command
from ldmcli.gallery.varied import drawn_from, valued
from ldmcli.images.formats import ENDINGS
from ldmcli.images.metadata import read_record
from ldmcli.spec import GenerationRequest

BRIEF_PAGE_SIZE = 10_000  # prompts on a page of the list that searches all: ≈ 5 MB, which a browser filters at once
_MAX_NUMBER = (1 << 63) - 1  # of SQLite
_FIRST = ("model", "size", "seed", "steps", "sampler", "schedule", "guidance_scale", "negative_prompt")  # in this order
_ORIGIN = ("line", "id", "file")  # where pictures come from: what tells them apart anyway
_DEFAULTS = {field.name: valued(field.default) for field in dataclasses.fields(GenerationRequest)}

# Row, number (-1: the row could not be read and has no picture), whether it was drawn, and card.
_Found = tuple[int, int, bool, Card]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Gallery:
    """What was written."""

    index: Path
    pictures: int
    failed: int
    pages: int


def write_gallery(folder: Path, index: Path | None = None, *, page_size: int = 200) -> Gallery:
    """Write `index` (default: index.html in `folder`) and the pages that follow it beside it, each whole or not at all.

    Raises MissingInputError where there is no such folder or nothing to show in it, CannotCreateError where a page
    would replace a file that is no gallery's, StorageError where writing fails.
    """
    index = folder / "index.html" if index is None else index
    with _database() as rows:
        found = _found_in(folder, os.path.relpath(folder.resolve(), index.parent.resolve()))
        count, failed, varied = _collect(rows, folder, found)
        pages = _names(index, "page", count, page_size)
        lists = _names(index, "prompts", count, BRIEF_PAGE_SIZE) if len(pages) > 1 else []
        prepare_folder(index.parent)
        for name in (*pages, *lists):
            check_may_write(index.parent / name, MARK.encode(), "gallery page", "--output")
        summary = f"{count - failed:,} pictures" + (f", {failed:,} failed" if failed else "")
        page = Page(folder.resolve().name, summary, pages, varied=varied, other=lists[0] if lists else "")
        brief = page._replace(names=lists, brief=True, other=pages[0])
        for these, size in ((brief, BRIEF_PAGE_SIZE), (page, page_size)):
            _write_pages(index.parent, these, _cards(rows, pages, page_size, varied), size)
    for kind, names in (("page", pages), ("prompts", lists)):
        _remove_left_over(index, kind, len(names))
    return Gallery(index, count - failed, failed, len(pages))


@contextlib.contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    """A database of no name, in memory while it is small, then in the temporary folder."""
    try:
        with contextlib.closing(sqlite3.connect("")) as rows:
            yield rows
    except sqlite3.Error as error:
        raise StorageError(
            f"sorting the pictures failed: {error}; free some space where TMPDIR or /var/tmp is and run again."
        ) from error


def _found_in(folder: Path, base: str) -> Iterator[_Found]:
    if not folder.is_dir():
        raise MissingInputError(f"{shown(folder)} is no folder; name one that ldm batch or ldm txt2img wrote to.")
    return _from_manifests(folder, base) if _is_batch(folder) else _from_pictures(folder, base)


def _is_batch(folder: Path) -> bool:
    return (folder / "manifest").is_dir()


def _collect(rows: sqlite3.Connection, folder: Path, found: Iterable[_Found]) -> tuple[int, int, list[str]]:
    """Fill the table with one row per picture, in the order to show them; returns how many, how many failed, and which
    fields are not the same in all."""
    rows.execute("CREATE TABLE card (row INTEGER, number INTEGER, done INTEGER, card TEXT, PRIMARY KEY (row, number))")
    first: dict[str, str] = {}
    varied: dict[str, None] = {}

    def noted(card: Card) -> str:
        if card.path and card.fields and not first:
            first.update(card.fields)
        names = {**card.fields, **first} if card.path else {}
        varied.update((name, None) for name in names if card.fields.get(name) != first.get(name))
        return json.dumps(card)

    # A picture can have several lines, of attempts; one that was drawn stays drawn, else the last line counts.
    rows.executemany(
        "INSERT INTO card VALUES (?, ?, ?, ?) ON CONFLICT (row, number) DO UPDATE "
        "SET done = excluded.done, card = excluded.card WHERE excluded.done >= card.done",
        ((row, number, done, noted(card)) for row, number, done, card in found),
    )
    count, done = rows.execute("SELECT count(*), total(done) FROM card").fetchone()
    if not count and not _is_batch(folder):
        raise MissingInputError(
            f"{shown(folder)} holds neither the manifest of a batch run nor a picture with an ldmcli record; name a "
            "folder that ldm batch or ldm txt2img wrote to."
        )
    names = [name for name in {**first, **varied} if name in varied and name not in _ORIGIN]
    return count, count - int(done), sorted(names, key=lambda name: name == "seed")  # which nearly always varies


def _from_manifests(folder: Path, base: str) -> Iterator[_Found]:
    from ldmcli.batch.manifest import DONE, read_manifests
    from ldmcli.batch.runfile import read_run

    model: Mapping[str, Any] = {}
    with contextlib.suppress(LdmError):
        model = read_run(folder).model
    for line in read_manifests(folder):
        row = min(line["row"], _MAX_NUMBER)
        number = -1 if line["number"] is None else min(line["number"], _MAX_NUMBER)
        done = line["status"] == DONE
        failure = str(line.get("error") or "It failed, and the manifest does not say why.")
        path, fault = _found(line.get("path", ""), folder, base) if done else ("", failure)
        extra = line.get("extra")  # the columns of the input that are no field of a request
        origin = {"line": line.get("line"), "id": line["id"], **(extra if isinstance(extra, dict) else {})}
        anchor = f"row{row}" if number < 0 else f"p{number}"
        yield row, number, done, _card(anchor, line.get("request"), model, origin, path, fault)


def _from_pictures(folder: Path, base: str) -> Iterator[_Found]:
    """Of each picture below `folder` that carries a record, by folder and name."""
    number = others = 0
    for path in _pictures(folder):
        try:
            record = read_record(path)
        except LdmError as error:
            _log.debug("%s", error)
            others += 1
            continue
        name = path.relative_to(folder).as_posix()
        there = os.path.normpath(os.path.join(base, name))
        yield 1, number, True, _card(f"p{number}", record["request"], record["model"], {"file": name}, there)
        number += 1
    if others:
        _log.warning("%d pictures carry no readable ldmcli record and are left out", others)


def _pictures(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder, onerror=_warn_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                yield Path(where, name)


def _warn_unreadable(error: OSError) -> None:
    _log.warning("%s cannot be read and is left out: %s", shown(Path(str(error.filename))), error.strerror)


def _card(
    anchor: str, request: Any, model: Mapping[str, Any], origin: Mapping[str, Any], path: str, fault: str = ""
) -> Card:
    """The card of a picture with what its request says, the model's name, and where it comes from."""
    request = request if isinstance(request, dict) else {}
    width, height = request.get("width"), request.get("height")
    size = (width, height) if all(isinstance(side, int) and side > 0 for side in (width, height)) else None
    values = {"model": model.get("name"), "size": "{}×{}".format(*size) if size else None} if request else {}
    values |= {name: value for name, value in request.items() if name not in ("prompt", "width", "height")}
    ordered = [name for name in _FIRST if name in values] + [name for name in values if name not in _FIRST]
    fields = {name: text for name in ordered if (text := valued(values[name]))}
    for name, value in origin.items():
        if text := valued(value):
            fields[name if name not in fields else f"{name} (input)"] = text
    return Card(anchor, drawn_from(request), path, size, fields, command(request, model) if path else "", fault)


def _found(path: str, folder: Path, base: str) -> tuple[str, str]:
    """The picture `path` of `folder` as seen from the pages, or what keeps it from being shown."""
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts:
        return "", f"{printable(path)} is no file inside the folder."
    try:
        is_file = stat.S_ISREG(os.stat(folder / parts).st_mode)
    except (OSError, ValueError):
        is_file = False
    if not is_file:
        return "", f"The file {printable(path)} is no longer there."
    return os.path.normpath(os.path.join(base, parts)), ""


def _cards(rows: sqlite3.Connection, pages: list[str], page_size: int, varied: Sequence[str]) -> Iterator[Card]:
    """The cards in order, each with the page that has it in full; without what is as usual in all of them."""
    always = {*_FIRST, *varied}
    for position, (text,) in enumerate(rows.execute("SELECT card FROM card ORDER BY row, number")):
        card = Card(*json.loads(text))
        fields = {name: value for name, value in card.fields.items() if name in always or value != _DEFAULTS.get(name)}
        yield card._replace(fields=fields, page=pages[position // page_size])


def _names(index: Path, kind: str, count: int, size: int) -> list[str]:
    """The files of `count` cards, `size` to a page: index.html, page-2.html …; beside another index, with its name."""
    return [_name(index, kind, number) for number in range(1, max(1, -(-count // size)) + 1)]


def _name(index: Path, kind: str, number: int) -> str:
    if (kind, number) == ("page", 1):
        return index.name
    prefix = "" if index.name == "index.html" else f"{index.stem}-"
    return f"{prefix}{kind}.html" if number == 1 else f"{prefix}{kind}-{number}.html"


def _write_pages(folder: Path, page: Page, cards: Iterable[Card], size: int) -> None:
    """Write every page; the first one last, so that it never leads to one that is not there yet."""
    cards = iter(cards)
    texts = (render(page._replace(here=i), list(itertools.islice(cards, size))) for i in range(len(page.names)))
    first = zip(page.names[:1], [*itertools.islice(texts, 1)], strict=True)
    for name, text in itertools.chain(zip(page.names[1:], texts, strict=True), first):
        write_exact(folder / name, text, overwrite=True)


def _remove_left_over(index: Path, kind: str, pages: int) -> None:
    """Delete the pages of a longer gallery that stood here before."""
    for number in itertools.count(pages + 1):
        path = index.parent / _name(index, kind, number)
        if not is_marked(path, MARK.encode()):
            return
        path.unlink()
