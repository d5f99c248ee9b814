"""How a gallery looks: one HTML page from the cards on it, all text escaped, nothing fetched from anywhere else.

The pages work from a web server and straight from the disk (file://), and without scripts, as plain links. The style
and the one script stand in the page; the policy allows these two by their hashes, and pictures.
"""

import base64
import dataclasses
import hashlib
import html
import os
import unicodedata
import urllib.parse
from collections.abc import Iterator, Sequence

from ldmcli import __version__

MARK = '<meta name="generator" content="ldm gallery'  # by which a page that may be replaced is known
_BRIEF = 300  # characters of a prompt in the list of all
_JOINERS = "\u200c\u200d"  # within words of Persian and Indic scripts, and emoji

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c1e; --dim: #5c5c64; --edge: #d4d4da; --tint: #f4f4f6;
  --link: #0b57d0; --fault: #a3190b; }
@media (prefers-color-scheme: dark) { :root { --paper: #161618; --ink: #ececf0; --dim: #a4a4ae; --edge: #3a3a40;
  --tint: #222226; --link: #9cc2ff; --fault: #ff9d8f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 110rem; padding: 1.25rem; background: var(--paper); color: var(--ink);
  font: 0.9375rem/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 0.25rem; font-size: 1.375rem; overflow-wrap: anywhere; }
p { margin: 0; }
a { color: var(--link); }
a:focus-visible, input:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
[hidden] { display: none !important; }
.dim, .settings, .without { color: var(--dim); }
nav { margin: 1rem 0; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem; margin: 0; padding: 0; list-style: none; }
nav li > * { display: block; min-width: 2.25rem; padding: 0.25rem 0.625rem; border: 1px solid var(--edge);
  border-radius: 0.375rem; text-align: center; text-decoration: none; }
nav [aria-current] { background: var(--ink); border-color: var(--ink); color: var(--paper); }
.filter { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem 0.75rem; margin: 1rem 0; }
.filter input { flex: 0 1 24rem; min-width: 0; padding: 0.375rem 0.625rem; border: 1px solid var(--dim);
  border-radius: 0.375rem; background: var(--paper); color: inherit; font: inherit; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: 1.25rem 1rem;
  margin: 1rem 0; padding: 0; list-style: none; }
.brief { grid-template-columns: repeat(auto-fill, minmax(min(9rem, 100%), 1fr)); font-size: 0.8125rem; }
.cards > li { content-visibility: auto; contain-intrinsic-size: auto 20rem; overflow-wrap: anywhere; }
.brief > li { contain-intrinsic-size: auto 12rem; }
.cards > li:target { outline: 3px solid var(--link); outline-offset: 0.375rem; }
.cards img { display: block; width: 100%; height: auto; background: var(--tint); border-radius: 0.25rem; }
.prompt { white-space: pre-wrap; margin-top: 0.375rem; max-height: 12em; overflow-y: auto; }
.brief .fault { display: block; text-align: center; }
.brief .prompt { display: block; max-height: 6em; overflow: hidden; }
.settings, .without { font-size: 0.8125rem; }
.fault { padding: 0.75rem; border: 1px solid var(--fault); border-radius: 0.25rem; color: var(--fault); }
"""

# What is sought stands in the address (#q=…), so that it survives a reload and goes along to the next page.
SCRIPT = """
"use strict";
(() => {
  const box = document.getElementById("q");
  const found = document.getElementById("found");
  const cards = [...document.querySelectorAll(".cards > li")];
  const prompts = cards.map((card) => card.querySelector(".prompt").textContent.toLowerCase());
  const links = [...document.querySelectorAll("a.along")];
  const all = document.getElementById("all");
  function filter() {
    const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    cards.forEach((card, i) => {
      card.hidden = !words.every((word) => prompts[i].includes(word));
      shown += card.hidden ? 0 : 1;
    });
    found.textContent = words.length ? `${shown} of ${cards.length} on this page` : "";
    for (const link of links) link.hash = words.length ? "q=" + encodeURIComponent(box.value) : "";
  }
  function read() {
    if (!location.hash.startsWith("#q=")) return;
    try { box.value = decodeURIComponent(location.hash.slice(3)); } catch { return; }
    filter();
  }
  box.addEventListener("input", () => {
    filter();
    try { history.replaceState(null, "", "#q=" + encodeURIComponent(box.value)); } catch { /* too often */ }
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && all) location.href = all.href;
    if (event.key === "Escape") { box.value = ""; box.dispatchEvent(new Event("input")); }
  });
  window.addEventListener("hashchange", read);
  box.closest(".filter").hidden = false;
  filter();
  read();
})();
"""


@dataclasses.dataclass(frozen=True)
class Card:
    """One picture: its file relative to the page; or none, and a `fault` that says why."""

    anchor: str
    prompt: str
    path: str = ""
    width: int = 0
    height: int = 0
    negative_prompt: str = ""
    settings: str = ""
    fault: str = ""
    page: str = ""  # on which the full card stands


@dataclasses.dataclass(frozen=True)
class Page:
    """Where a page stands among its like: `names` are the files of all of them, `index` is this one's, from 0.

    `every` names the first page of the list of all prompts, or nothing where all pictures stand on one page; `at_once`
    is how many of them one page has, where that is not all.
    """

    title: str
    summary: str
    names: Sequence[str]
    index: int
    brief: bool = False
    home: str = ""
    every: str = ""
    at_once: int = 0


def render(page: Page, cards: Sequence[Card]) -> bytes:
    """The page as UTF-8. Lone surrogates cannot be in it: `visible` has spelled them out."""
    return "".join(_lines(page, cards)).encode("utf-8")


def href(name: str) -> str:
    """The file `name` beside the page, or below or above its folder, as a URL. Quoting leaves no colon, so it can be no
    other scheme; and a path that is not absolute can be no other host."""
    return html.escape(urllib.parse.quote(os.fsencode(name)))


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


def _lines(page: Page, cards: Sequence[Card]) -> Iterator[str]:
    title = html.escape(visible(page.title))
    number = f" – {page.index + 1}" if len(page.names) > 1 else ""
    yield (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="referrer" content="no-referrer">\n{MARK} {html.escape(__version__)}">\n'
        f"<title>{title}{number}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header>\n<h1><bdi>{title}</bdi></h1>\n<p class="dim">{html.escape(page.summary)}</p>\n'
    )
    yield from _filter(page)
    yield from _paging(page, "Pages")
    yield "</header>\n<main>\n"
    if cards:
        yield f'<ol class="cards{" brief" if page.brief else ""}">\n'
        yield from (_brief(card) if page.brief else _card(card) for card in cards)
        yield "</ol>\n"
    yield "</main>\n<footer>\n"
    yield from _paging(page, "Pages, again")
    yield f"</footer>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"


def _filter(page: Page) -> Iterator[str]:
    """The box to filter with, which the script shows; without scripts the browser's own search has to do."""
    yield (
        '<div class="filter" role="search" hidden>\n<label for="q">Filter by prompt</label>\n'
        '<input id="q" type="search" autocomplete="off" spellcheck="false">\n'
        '<span id="found" role="status"></span>\n</div>\n'
    )
    if page.brief:
        yield f'<p><a class="along" href="{href(page.home)}">Back to the pictures</a></p>\n'
        yield f'<p class="dim">Prompts are searched in their first {_BRIEF:,} characters.</p>\n'
    elif page.every:
        all_pages = "Search the prompts of all pages" + (f", {page.at_once:,} at a time" if page.at_once else "")
        yield f'<p><a class="along" id="all" href="{href(page.every)}">{all_pages}</a></p>\n'


def _paging(page: Page, label: str) -> Iterator[str]:
    """Links to the first and the last page, to those around this one, and to the one before and after."""
    last = len(page.names) - 1
    if not last:
        return
    yield f'<nav aria-label="{label}">\n<ul>\n'
    if page.index:
        yield _link(page.names[page.index - 1], "Previous", ' rel="prev"')
    near = sorted({0, last, *range(max(0, page.index - 2), min(last, page.index + 2) + 1)})
    for before, index in zip([-1, *near], near, strict=False):
        if index > before + 1:
            yield "<li><span>…</span></li>\n"
        yield _link(page.names[index], f"{index + 1:,}", ' aria-current="page"' if index == page.index else "")
    if page.index < last:
        yield _link(page.names[page.index + 1], "Next", ' rel="next"')
    yield "</ul>\n</nav>\n"


def _link(name: str, text: str, more: str) -> str:
    return f'<li><a class="along" href="{href(name)}"{more}>{text}</a></li>\n'


def _card(card: Card) -> str:
    parts = [f'<li id="{card.anchor}">\n']
    if card.path:
        parts.append(f'<a href="{href(card.path)}">{_image(card)}</a>\n')
    if card.fault:
        parts.append(f'<p class="fault"><bdi>{html.escape(visible(card.fault))}</bdi></p>\n')
    prompt = html.escape(visible(card.prompt)) or '<span class="dim">(no prompt)</span>'
    parts.append(f'<p class="prompt" dir="auto"><bdi>{prompt}</bdi></p>\n')
    if card.negative_prompt:
        negative = html.escape(visible(card.negative_prompt))
        parts.append(f'<p class="without">without: <bdi>{negative}</bdi></p>\n')
    if card.settings:
        parts.append(f'<p class="settings"><bdi>{html.escape(visible(card.settings))}</bdi></p>\n')
    return "".join([*parts, "</li>\n"])


def _brief(card: Card) -> str:
    """A card of the list of every prompt: small, and a link to the full one."""
    prompt = html.escape(visible(card.prompt, _BRIEF)) or "(no prompt)"
    fault = '<span class="fault" role="img" aria-label="failed">✗</span>' if card.fault else ""
    image = _image(dataclasses.replace(card, prompt="")) if card.path else fault
    return f'<li><a href="{href(card.page)}#{card.anchor}">{image}<bdi class="prompt">{prompt}</bdi></a></li>\n'


def _image(card: Card) -> str:
    """The picture, its place kept free until it has come. In a brief card the prompt beside it says all."""
    size = f' width="{card.width}" height="{card.height}"' if card.width and card.height else ""
    alt = html.escape(visible(card.prompt, 200)).replace("\n", " ")
    return f'<img src="{href(card.path)}" alt="{alt}"{size} loading="lazy" decoding="async">'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# 'self' is not meant to match files on the disk, though Chromium lets it; so they are named.
POLICY = (
    f"default-src 'none'; img-src 'self' file:; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; "
    "base-uri 'none'; form-action 'none'"
)
