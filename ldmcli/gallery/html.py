"""How a gallery looks: one HTML page from the cards on it, all text escaped, nothing fetched from anywhere else.

The pages work from a web server and straight from the disk (file://), and without scripts, as plain links and folded
settings. The style and the one script stand in the page; the policy allows these two by their hashes, and pictures.
"""

import base64
import hashlib
import html
import os
import unicodedata
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ldmcli import __version__

MARK = '<meta name="generator" content="ldm gallery'  # by which a page that may be replaced is known
_BRIEF = 300  # characters of a prompt in the list of all
_VALUE = 60  # … of a value in a caption
_JOINERS = "\u200c\u200d"  # within words of Persian and Indic scripts, and emoji

_FOLDER = Path(__file__).parent
STYLE = (_FOLDER / "page.css").read_text("utf-8")
SCRIPT = (_FOLDER / "page.js").read_text("utf-8")


class Card(NamedTuple):
    """One picture: its file relative to the page; or none, and a `fault` that says why. `fields` are its settings and
    where it comes from, `command` draws it again."""

    anchor: str
    prompt: str = ""
    path: str = ""
    size: tuple[int, int] | None = None
    fields: Mapping[str, str] = {}
    command: str = ""
    fault: str = ""
    page: str = ""  # on which the full card stands


class Page(NamedTuple):
    """A page among its like: `names` are the files of all of them, `here` is this one's place among them, from 0.

    `varied` are the fields that are not the same in all pictures, which captions show. `brief`: it lists prompts to
    search in, of all pages. `other` is the first page of the other kind, or nothing.
    """

    title: str
    summary: str
    names: Sequence[str]
    here: int = 0
    varied: Sequence[str] = ()
    brief: bool = False
    other: str = ""


def render(page: Page, cards: Sequence[Card]) -> bytes:
    """The page as UTF-8. Lone surrogates cannot be in it: `visible` has spelled them out."""
    title = _text(page.title)
    number = f" – {page.here + 1}" if len(page.names) > 1 else ""
    shown = "".join(_brief(card, page.varied) if page.brief else _full(card, page.varied) for card in cards)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
{MARK} {html.escape(__version__)}">
<title>{title}{number}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1><bdi>{title}</bdi></h1>
<p class="dim">{html.escape(page.summary)}</p>
<div class="filter" id="filter" role="search" hidden>
<label for="q">Filter</label>
<input id="q" type="search" autocomplete="off" spellcheck="false" placeholder="words, steps:20, guidance&gt;5">
<span id="found" role="status"></span>
</div>
{_other(page)}{_paging(page, "Pages")}</header>
<main>
<ol class="cards{" brief" if page.brief else ""}">
{shown}</ol>
</main>
<footer>
{_paging(page, "Pages, again")}</footer>
{"" if page.brief else _VIEW}<script>{SCRIPT}</script>
</body>
</html>
""".encode()


def visible(text: str, limit: int = 2000) -> str:
    """`text` for a reader: cut to `limit` characters, and what is unseen or turns the direction of the text spelled
    out as an escape."""
    shown = text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"
    if shown.isprintable():
        return shown
    return "".join(char if _is_plain(char) else char.encode("unicode_escape").decode("ascii") for char in shown)


def _is_plain(char: str) -> bool:
    if char in "\n\t" or char in _JOINERS:
        return True
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp") and ord(char) & 0xFFFE != 0xFFFE


def _text(text: str, limit: int = 2000) -> str:
    return html.escape(visible(text, limit))


def _href(name: str) -> str:
    """The file `name` beside the page, or below or above its folder, as a URL. Quoting leaves no colon, so it can be no
    other scheme; and a path that is not absolute can be no other host."""
    return html.escape(urllib.parse.quote(os.fsencode(name)))


def _other(page: Page) -> str:
    """The way to the list of all prompts, and back."""
    if page.brief:
        note = f"Prompts are searched in their first {_BRIEF:,} characters."
        back = f'<a class="along" href="{_href(page.other)}">Back to the pictures</a>'
        return f'<p>{back}</p>\n<p class="dim">{note}</p>\n'
    all_pages = f'<a class="along" id="all" href="{_href(page.other)}">Search the prompts of all pages</a>'
    return f"<p>{all_pages}</p>\n" if page.other else ""


def _paging(page: Page, label: str) -> str:
    """Links to the first and the last page, to those around this one, and to the one before and after."""
    here, last = page.here, len(page.names) - 1
    if not last:
        return ""
    near = sorted({0, last, *range(max(0, here - 2), min(last, here + 2) + 1)})
    links = [(here - 1, "Previous", ' rel="prev"')] if here else []
    for before, index in zip([-1, *near], near, strict=False):
        links += [(-1, "…", "")] if index > before + 1 else []
        links.append((index, f"{index + 1:,}", ' aria-current="page"' if index == here else ""))
    links += [(here + 1, "Next", ' rel="next"')] if here < last else []
    items = (
        f'<a class="along" href="{_href(page.names[index])}"{more}>{text}</a>' if index >= 0 else f"<span>{text}</span>"
        for index, text, more in links
    )
    return f'<nav aria-label="{label}">\n<ul>\n' + "".join(f"<li>{item}</li>\n" for item in items) + "</ul>\n</nav>\n"


def _full(card: Card, varied: Sequence[str]) -> str:
    image = f'<a class="picture" href="{_href(card.path)}">{_image(card, card.prompt)}</a>\n' if card.path else ""
    own = (name for name in varied if name in card.fields)
    caption = " · ".join(f"{name.replace('_', ' ')} {card.fields[name][:_VALUE]}" for name in own)
    parts = (
        ('class="fault"', _text(card.fault)),
        ('class="prompt" dir="auto"', _text(card.prompt) or '<span class="dim">(no prompt)</span>'),
        ('class="varied"', _text(caption)),
    )
    lines = "".join(f"<p {looks}><bdi>{text}</bdi></p>\n" for looks, text in parts if text)
    return f'<li id="{card.anchor}">\n{image}{lines}{_details(card)}</li>\n'


def _details(card: Card) -> str:
    """All settings, folded up, and the command."""
    rows = "".join(
        f"<div><dt>{_text(name.replace('_', ' '))}</dt> <dd><bdi>{_text(value)}</bdi></dd></div>\n"
        for name, value in card.fields.items()
    )
    fields = f'<dl class="fields">\n{rows}</dl>\n' if rows else ""
    # What would have to be spelled out cannot be typed either.
    typed = card.command if card.command == visible(card.command, len(card.command)) else ""
    command = f'<code>{html.escape(typed)}</code>\n<button class="copy" type="button" hidden>Copy</button>'
    command = f'<div class="command">{command}</div>\n' if typed else ""
    return f"<details>\n<summary>settings</summary>\n{fields}{command}</details>\n" if fields or command else ""


def _brief(card: Card, varied: Sequence[str]) -> str:
    """A card of the list of every prompt: small, and a link to the full one; with the fields that tell it from others,
    to filter by."""
    fault = '<span class="fault" role="img" aria-label="failed">✗</span>' if card.fault else ""
    image = _image(card, "") if card.path else fault  # the prompt beside it says all
    prompt = _text(card.prompt, _BRIEF) or "(no prompt)"
    fields = "\n".join(f"{name}={value}" for name, value in card.fields.items() if name in varied)
    data = f' data-fields="{_text(fields)}"' if fields else ""
    link = f'<a href="{_href(card.page)}#{card.anchor}">{image}<bdi class="prompt">{prompt}</bdi></a>'
    return f"<li{data}>{link}</li>\n"


def _image(card: Card, prompt: str) -> str:
    """The picture, its place kept free until it has come."""
    size = ' width="{}" height="{}"'.format(*card.size) if card.size else ""
    alt = _text(prompt, 200).replace("\n", " ")
    return f'<img src="{_href(card.path)}" alt="{alt}"{size} loading="lazy" decoding="async">'


_VIEW = """<dialog id="view" aria-label="Picture">
<div class="bar">
<button id="before" type="button" aria-label="Previous">‹</button>
<button id="after" type="button" aria-label="Next">›</button>
<span id="place" class="dim" role="status"></span>
<span class="keys dim"><kbd>←</kbd> <kbd>→</kbd> walk, <kbd>c</kbd> compares, <kbd>y</kbd> copies the command</span>
<button id="compare" type="button" aria-pressed="false">Compare</button>
<button id="close" type="button">Close</button>
</div>
<div class="stage">
<figure id="one"></figure>
<figure id="two" hidden></figure>
</div>
<section id="facts" class="facts" aria-label="Settings"></section>
</dialog>
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# 'self' is not meant to match files on the disk, though Chromium lets it; so they are named.
POLICY = (
    f"default-src 'none'; img-src 'self' file:; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; "
    "base-uri 'none'; form-action 'none'"
)
