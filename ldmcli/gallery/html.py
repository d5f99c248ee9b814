"""How a gallery looks: one HTML page from the cards on it, all text escaped, nothing fetched from anywhere else.

The pages work from a web server and straight from the disk (file://), and without scripts, as plain links. The style
and the one script stand in the page; the policy allows these two by their hashes, and pictures.
"""

import base64
import hashlib
import html
import os
import unicodedata
import urllib.parse
from collections.abc import Sequence
from typing import NamedTuple

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


class Card(NamedTuple):
    """One picture: its file relative to the page; or none, and a `fault` that says why."""

    anchor: str
    prompt: str = ""
    path: str = ""
    size: tuple[int, int] | None = None
    negative_prompt: str = ""
    settings: str = ""
    fault: str = ""
    page: str = ""  # on which the full card stands


class Page(NamedTuple):
    """A page among its like: `names` are the files of all of them, `here` is this one's place among them, from 0.

    `brief`: it lists prompts to search in, of all pages. `other` is the first page of the other kind, or nothing.
    """

    title: str
    summary: str
    names: Sequence[str]
    here: int = 0
    brief: bool = False
    other: str = ""


def render(page: Page, cards: Sequence[Card]) -> bytes:
    """The page as UTF-8. Lone surrogates cannot be in it: `visible` has spelled them out."""
    title = _text(page.title)
    number = f" – {page.here + 1}" if len(page.names) > 1 else ""
    shown = "".join(_brief(card) if page.brief else _full(card) for card in cards)
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
<div class="filter" role="search" hidden>
<label for="q">Filter by prompt</label>
<input id="q" type="search" autocomplete="off" spellcheck="false">
<span id="found" role="status"></span>
</div>
{_other(page)}{_paging(page, "Pages")}</header>
<main>
<ol class="cards{" brief" if page.brief else ""}">
{shown}</ol>
</main>
<footer>
{_paging(page, "Pages, again")}</footer>
<script>{SCRIPT}</script>
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


def _full(card: Card) -> str:
    image = f'<a href="{_href(card.path)}">{_image(card, card.prompt)}</a>\n' if card.path else ""
    parts = (
        ('class="fault"', "", _text(card.fault)),
        ('class="prompt" dir="auto"', "", _text(card.prompt) or '<span class="dim">(no prompt)</span>'),
        ('class="without"', "without: ", _text(card.negative_prompt)),
        ('class="settings"', "", _text(card.settings)),
    )
    lines = "".join(f"<p {looks}>{before}<bdi>{text}</bdi></p>\n" for looks, before, text in parts if text)
    return f'<li id="{card.anchor}">\n{image}{lines}</li>\n'


def _brief(card: Card) -> str:
    """A card of the list of every prompt: small, and a link to the full one."""
    fault = '<span class="fault" role="img" aria-label="failed">✗</span>' if card.fault else ""
    image = _image(card, "") if card.path else fault  # the prompt beside it says all
    prompt = _text(card.prompt, _BRIEF) or "(no prompt)"
    return f'<li><a href="{_href(card.page)}#{card.anchor}">{image}<bdi class="prompt">{prompt}</bdi></a></li>\n'


def _image(card: Card, prompt: str) -> str:
    """The picture, its place kept free until it has come."""
    size = ' width="{}" height="{}"'.format(*card.size) if card.size else ""
    alt = _text(prompt, 200).replace("\n", " ")
    return f'<img src="{_href(card.path)}" alt="{alt}"{size} loading="lazy" decoding="async">'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# 'self' is not meant to match files on the disk, though Chromium lets it; so they are named.
POLICY = (
    f"default-src 'none'; img-src 'self' file:; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; "
    "base-uri 'none'; form-action 'none'"
)
