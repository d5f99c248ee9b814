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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ldmcli.disk.opening import shown
from ldmcli.disk.writing import check_may_write, is_marked, prepare_folder, write_exact
from ldmcli.errors import LdmError, MissingInputError, StorageError, printable
from ldmcli.gallery.html import MARK, Card, Page, render
from ldmcli.gallery.varied import details, fields_of_grid
from ldmcli.images.formats import ENDINGS
from ldmcli.images.metadata import read_record

BRIEF_PAGE_SIZE = 10_000  # prompts on a page of the list that searches all: ≈ 5 MB, which a browser filters at once
_MAX_NUMBER = (1 << 63) - 1  # of SQLite
_SETTINGS = (
    ("seed", "seed {}"), ("steps", "{} steps"), ("sampler", "{}"), ("schedule", "{}"),
    ("guidance_scale", "guidance {}"), ("size", "{}"),
)  # fmt: skip
_SHOWN = (*(name for name, _ in _SETTINGS), "width", "height", "prompt", "negative_prompt")

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
        count, failed = _collect(rows, folder, os.path.relpath(folder.resolve(), index.parent.resolve()))
        pages = _names(index, "page", count, page_size)
        lists = _names(index, "prompts", count, BRIEF_PAGE_SIZE) if len(pages) > 1 else []
        prepare_folder(index.parent)
        for name in (*pages, *lists):
            check_may_write(index.parent / name, MARK.encode(), "gallery page", "--output")
        summary = f"{count - failed:,} pictures" + (f", {failed:,} failed" if failed else "")
        page = Page(folder.resolve().name, summary, pages, other=lists[0] if lists else "")
        brief = page._replace(names=lists, brief=True, other=pages[0])
        for these, size in ((brief, BRIEF_PAGE_SIZE), (page, page_size)):
            _write_pages(index.parent, these, _cards(rows, pages, page_size), size)
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


def _collect(rows: sqlite3.Connection, folder: Path, base: str) -> tuple[int, int]:
    """Fill the table with one row per picture, in the order to show them; returns how many, and how many failed."""
    rows.execute("CREATE TABLE card (row INTEGER, number INTEGER, done INTEGER, card TEXT, PRIMARY KEY (row, number))")
    if not folder.is_dir():
        raise MissingInputError(f"{shown(folder)} is no folder; name one that ldm batch or ldm txt2img wrote to.")
    is_batch = (folder / "manifest").is_dir()
    found = _from_manifests(folder, base) if is_batch else _from_pictures(folder, base)
    # A picture can have several lines, of attempts; one that was drawn stays drawn, else the last line counts.
    rows.executemany(
        "INSERT INTO card VALUES (?, ?, ?, ?) ON CONFLICT (row, number) DO UPDATE "
        "SET done = excluded.done, card = excluded.card WHERE excluded.done >= card.done",
        ((row, number, done, json.dumps(card)) for row, number, done, card in found),
    )
    count, done = rows.execute("SELECT count(*), total(done) FROM card").fetchone()
    if not count and not is_batch:
        raise MissingInputError(
            f"{shown(folder)} holds neither the manifest of a batch run nor a picture with an ldmcli record; name a "
            "folder that ldm batch or ldm txt2img wrote to."
        )
    return count, count - int(done)


def _from_manifests(folder: Path, base: str) -> Iterator[tuple[int, int, bool, Card]]:
    """Row, number (-1: the row could not be read and has no picture), whether it was drawn, and card of each line."""
    from ldmcli.batch.manifest import DONE, read_manifests

    varied = fields_of_grid(folder)
    for line in read_manifests(folder):
        row = min(line["row"], _MAX_NUMBER)
        number = -1 if line["number"] is None else min(line["number"], _MAX_NUMBER)
        done = line["status"] == DONE
        failure = str(line.get("error") or "It failed, and the manifest does not say why.")
        path, fault = _found(line.get("path", ""), folder, base) if done else ("", failure)
        extra = line.get("extra")  # the columns of the input that are no field of a request
        more = [f"{name}: {value}" for name, value in extra.items()] if isinstance(extra, dict) else []
        name = " · ".join([f"line {line.get('line')}", line["id"], *more])
        anchor = f"row{row}" if number < 0 else f"p{number}"
        yield row, number, done, _card(anchor, line.get("request"), name, path, fault, varied)


def _from_pictures(folder: Path, base: str) -> Iterator[tuple[int, int, bool, Card]]:
    """The same of each picture below `folder` that carries a record, by folder and name."""
    number = others = 0
    for path in _pictures(folder):
        try:
            request = read_record(path)["request"]
        except LdmError as error:
            _log.debug("%s", error)
            others += 1
            continue
        name = path.relative_to(folder).as_posix()
        yield 1, number, True, _card(f"p{number}", request, name, os.path.normpath(os.path.join(base, name)))
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


def _card(anchor: str, request: Any, name: str, path: str, fault: str = "", varied: Sequence[str] = ()) -> Card:
    """The card of a picture with what its request says, and where it comes from; `varied` are the fields of a grid."""
    request = request if isinstance(request, dict) else {}
    width, height = request.get("width"), request.get("height")
    size = (width, height) if all(isinstance(side, int) and side > 0 for side in (width, height)) else None
    values = request | {"size": "{}×{}".format(*size) if size else None}
    settings = [text.format(values[key]) for key, text in _SETTINGS if values.get(key) is not None]
    return Card(
        anchor,
        str(request.get("prompt", "")),
        path,
        size,
        negative_prompt=str(request.get("negative_prompt") or ""),
        settings=" · ".join([*settings, *details(request, varied, _SHOWN), name]),
        fault=fault,
    )


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


def _cards(rows: sqlite3.Connection, pages: list[str], page_size: int) -> Iterator[Card]:
    """The cards in order, each with the page that has it in full."""
    for position, (card,) in enumerate(rows.execute("SELECT card FROM card ORDER BY row, number")):
        yield Card(*json.loads(card))._replace(page=pages[position // page_size])


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
