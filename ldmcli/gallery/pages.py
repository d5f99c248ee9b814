"""A folder of pictures as static HTML pages: from the manifest of a batch run, or from what the PNG files carry.

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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ldmcli.disk.opening import open_regular, shown
from ldmcli.disk.writing import prepare_folder, write_exact
from ldmcli.errors import CannotCreateError, LdmError, MissingInputError, StorageError, printable
from ldmcli.gallery.html import MARK, Card, Page, render
from ldmcli.images.metadata import read_record

MANIFESTS = "manifest"
BRIEF_PAGE_SIZE = 10_000  # prompts on a page of the list that searches all: ≈ 5 MB, which a browser filters at once
_MAX_NUMBER = (1 << 63) - 1  # of SQLite
_TITLE_BYTES = 4096  # of a page, in which its mark stands
_SETTINGS = (
    ("seed", "seed {}"), ("steps", "{} steps"), ("sampler", "{}"), ("schedule", "{}"),
    ("guidance_scale", "guidance {}"), ("size", "{}"),
)  # fmt: skip

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
        count, failed = _collect(rows, folder)
        prepare_folder(index.parent)
        pages = _names(index, "page", count, page_size)
        lists = _names(index, "prompts", count, BRIEF_PAGE_SIZE) if len(pages) > 1 else []
        for name in (*pages, *lists):
            _check_ours(index.parent / name)
        summary = f"{count - failed:,} pictures" + (f", {failed:,} failed" if failed else "")
        page = Page(folder.resolve().name, summary, pages, 0, every=lists[0] if lists else "")
        if len(lists) > 1:
            page = dataclasses.replace(page, at_once=BRIEF_PAGE_SIZE)
        brief = dataclasses.replace(page, names=lists, brief=True, home=pages[0])
        base = os.path.relpath(folder.resolve(), index.parent.resolve())
        _write_pages(index.parent, brief, _cards(rows, folder, base, pages, page_size), BRIEF_PAGE_SIZE)
        _write_pages(index.parent, page, _cards(rows, folder, base, pages, page_size), page_size)
    _remove_left_over(index, "page", len(pages))
    _remove_left_over(index, "prompts", len(lists))
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


def _collect(rows: sqlite3.Connection, folder: Path) -> tuple[int, int]:
    """Fill the table with one row per picture, in the order to show them; returns how many, and how many failed."""
    rows.execute("CREATE TABLE card (row INTEGER, number INTEGER, done INTEGER, facts TEXT, PRIMARY KEY (row, number))")
    if not folder.is_dir():
        raise MissingInputError(f"{shown(folder)} is no folder; name one that ldm batch or ldm txt2img wrote to.")
    is_batch = (folder / MANIFESTS).is_dir()
    facts = _from_manifests(folder) if is_batch else _from_pictures(folder)
    # A picture can have several lines, of attempts; one that was drawn stays drawn, else the last line counts.
    rows.executemany(
        "INSERT INTO card VALUES (?, ?, ?, ?) ON CONFLICT (row, number) DO UPDATE "
        "SET done = excluded.done, facts = excluded.facts WHERE excluded.done >= card.done",
        ((card["row"], card["number"], card["done"], json.dumps(card)) for card in facts),
    )
    count, done = rows.execute("SELECT count(*), total(done) FROM card").fetchone()
    if not count and not is_batch:
        raise MissingInputError(
            f"{shown(folder)} holds neither the manifest of a batch run nor a PNG with an ldmcli record; name a folder "
            "that ldm batch or ldm txt2img wrote to."
        )
    return count, count - int(done)


def _from_manifests(folder: Path) -> Iterator[dict[str, Any]]:
    """Row, number (-1: the row could not be read, so it has no picture) and facts of each line."""
    from ldmcli.batch.manifest import DONE, read_manifests

    for line in read_manifests(folder):
        number, request = line["number"], line.get("request")
        fields = request if isinstance(request, dict) else {}
        yield {
            "row": min(line["row"], _MAX_NUMBER),
            "number": -1 if number is None else min(number, _MAX_NUMBER),
            "done": line["status"] == DONE,
            "path": line.get("path", ""),
            "error": str(line.get("error") or "It failed, and the manifest does not say why."),
            "name": " · ".join([f"line {line.get('line')}", line["id"], *_extra(line.get("extra"))]),
            "request": fields,
        }


def _extra(extra: Any) -> list[str]:
    """The columns of the input that are no field of a request, as text."""
    return [f"{name}: {value}" for name, value in extra.items()] if isinstance(extra, dict) else []


def _from_pictures(folder: Path) -> Iterator[dict[str, Any]]:
    """What each PNG below `folder` that carries a record says, by folder and name."""
    number = others = 0
    for path in _pngs(folder):
        try:
            request = read_record(path)["request"]
        except LdmError as error:
            _log.debug("%s", error)
            others += 1
            continue
        relative = path.relative_to(folder).as_posix()
        facts = {"done": True, "path": relative, "error": "", "name": relative, "request": request}
        yield {"row": 1, "number": number, **facts}
        number += 1
    if others:
        _log.warning("%d PNG files carry no readable ldmcli record and are left out", others)


def _pngs(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder, onerror=_tell_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(".png") and not name.startswith("."):
                yield Path(where, name)


def _tell_unreadable(error: OSError) -> None:
    _log.warning("%s cannot be read and is left out: %s", shown(Path(str(error.filename))), error.strerror)


def _cards(rows: sqlite3.Connection, folder: Path, base: str, pages: list[str], page_size: int) -> Iterator[Card]:
    """The cards in order, each with the page that has it in full."""
    for position, (facts,) in enumerate(rows.execute("SELECT facts FROM card ORDER BY row, number")):
        card = _card(json.loads(facts), folder, base)
        yield dataclasses.replace(card, page=pages[position // page_size])


def _card(facts: Mapping[str, Any], folder: Path, base: str) -> Card:
    request = facts["request"]
    sizes = [request.get(name) for name in ("width", "height")]
    known = all(isinstance(size, int) and size > 0 for size in sizes)
    values = request | {"size": "{}×{}".format(*sizes) if known else None}
    settings = [text.format(values[name]) for name, text in _SETTINGS if values.get(name) is not None]
    path, fault = "", facts["error"]
    if facts["done"]:
        path, fault = _found(facts["path"], folder, base)
    return Card(
        anchor=f"row{facts['row']}" if facts["number"] < 0 else f"p{facts['number']}",
        prompt=str(request.get("prompt", "")),
        path=path,
        width=sizes[0] if known else 0,
        height=sizes[1] if known else 0,
        negative_prompt=str(request.get("negative_prompt") or ""),
        settings=" · ".join([*settings, facts["name"]] if facts["name"] else settings),
        fault=fault,
    )


def _found(path: str, folder: Path, base: str) -> tuple[str, str]:
    """The picture `path` of `folder` as seen from the pages, or what keeps it from being shown."""
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts:
        return "", f"'{printable(path)}' is no file inside the folder."
    try:
        is_file = stat.S_ISREG(os.stat(folder / parts).st_mode)
    except (OSError, ValueError):
        is_file = False
    if not is_file:
        return "", f"The file '{printable(path)}' is no longer there."
    return os.path.normpath(os.path.join(base, parts)), ""


def _names(index: Path, kind: str, count: int, size: int) -> list[str]:
    """The files of `count` cards, `size` to a page: index.html, page-2.html …; beside another index, with its name."""
    pages = max(1, -(-count // size))
    first = index.name if kind == "page" else _name(index, kind, 1)
    return [first, *(_name(index, kind, number) for number in range(2, pages + 1))]


def _name(index: Path, kind: str, number: int) -> str:
    prefix = "" if index.name == "index.html" else f"{index.stem}-"
    return f"{prefix}{kind}.html" if number == 1 else f"{prefix}{kind}-{number}.html"


def _write_pages(folder: Path, page: Page, cards: Iterable[Card], size: int) -> None:
    """Write every page; the first one last, so that it never leads to one that is not there yet."""
    if not page.names:
        return
    cards = iter(cards)
    first = list(itertools.islice(cards, size))
    for index, name in enumerate(page.names[1:], 1):
        here = dataclasses.replace(page, index=index)
        write_exact(folder / name, render(here, list(itertools.islice(cards, size))), overwrite=True)
    write_exact(folder / page.names[0], render(page, first), overwrite=True)


def _check_ours(path: Path) -> None:
    """Raise CannotCreateError where `path` is there and no page of a gallery."""
    if os.path.lexists(path) and not _is_ours(path):
        raise CannotCreateError(
            f"{shown(path)} is there already and is no page of a gallery; move it away or choose another --output."
        )


def _is_ours(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return MARK.encode() in file.read(_TITLE_BYTES)
    except LdmError:
        return False


def _remove_left_over(index: Path, kind: str, pages: int) -> None:
    """Delete the pages of a longer gallery that stood here before."""
    for number in itertools.count(pages + 1):
        path = index.parent / _name(index, kind, number)
        if not _is_ours(path):
            return
        path.unlink()
