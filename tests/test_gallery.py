"""`ldm gallery`: what a batch run and a folder of pictures look like as pages, read as HTML and in a real browser.

The browser is Chromium where it is installed; its tests skip themselves where it is not.
"""

import html.parser
import json
import os
import re
import shutil
import subprocess
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cli_support import assert_refused, ldm_here

from ldmcli.batch.items import BadRow, Item, Outcome
from ldmcli.batch.manifest import ManifestWriter
from ldmcli.batch.pictures import picture_path
from ldmcli.gallery.html import visible
from ldmcli.images.encode import encode_pixels
from ldmcli.images.metadata import text_chunks
from ldmcli.spec import GenerationRequest

OWNED = "document.title='owned'"
HOSTILE = (
    f"</script><img src=x onerror={OWNED}>",
    f"<script>{OWNED}</script>",
    f'"><svg onload="{OWNED}"> \' onmouseover=\'{OWNED}',
    f"--><style>*{{display:none}}</style></textarea></title><iframe srcdoc='<script>{OWNED}</script>'>",
    "&lt;b&gt; &amp; \u202egnp.exe\u2066 \x1b[31m \x00\x07".replace("\0", ""),
    f"javascript:{OWNED}",
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--hide-scrollbars",
    "--disable-dev-shm-usage", "--virtual-time-budget=2000", "--window-size=900,900",
)  # fmt: skip
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
MODEL = {"name": "tiny", "path": "", "sha256": "0" * 64}


class Reader(html.parser.HTMLParser):
    """Collects what a page holds, and asserts that its tags nest."""

    _VOID = ("meta", "img", "input")

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.prompts: list[str] = []
        self.text = ""
        self._open: list[tuple[str, str]] = []
        self.raw = page.read_text("utf-8")
        self.feed(self.raw)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), "an attribute is there twice"
        self.tags.append((tag, found))
        if tag not in self._VOID:
            self._open.append((tag, found.get("class") or ""))
        if found.get("class") == "prompt":
            self.prompts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        names = [name for name, _ in self._open]
        if "script" not in names and "style" not in names:
            self.text += data
        if any(kind == "prompt" for _, kind in self._open):
            self.prompts[-1] += data

    def all(self, tag: str, attribute: str) -> list[str]:
        return [found[attribute] or "" for name, found in self.tags if name == tag and attribute in found]


def picture(colour: Sequence[int] = (200, 40, 40), request: GenerationRequest | None = None) -> bytes:
    text = text_chunks(request, MODEL, {}) if request else {}
    return encode_pixels(np.full((32, 48, 3), colour, np.uint8), text)


def recipe(prompt: str, seed: int, **more: object) -> GenerationRequest:
    fields = {"steps": 20, "sampler": "ddim", "guidance_scale": 7.5, "width": 48, "height": 32}
    return GenerationRequest(prompt, seed=seed, **(fields | more))


def make_run(folder: Path, prompts: Sequence[str], failed: Sequence[int] = ()) -> Path:
    """A batch folder of two workers, the later pictures written first."""
    writers = [ManifestWriter(folder, name) for name in ("one", "two")]
    for number in reversed(range(len(prompts))):
        item = Item(number, number + 1, number + 1, f"id{number}", recipe(prompts[number], number), {"tag": "<i>t</i>"})
        path = picture_path(item)
        outcome = Outcome(item, "failed", error=f"NaN in <U-Net> of {number}.")
        if number not in failed:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(picture())
            outcome = Outcome(item, "done", path=path, sha256="0" * 64)
        writers[number % 2].append(outcome)
    for writer in writers:
        writer.close()
    return folder


def browse(page: Path, profile: Path, *more: str, fragment: str = "") -> tuple[str, str]:
    """Output and console messages of Chromium that looks at the file `page`."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *more, page.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    messages = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if "CONSOLE" in line]
    return done.stdout.decode("utf-8"), "\n".join(messages)


def shown_cards(dom: str) -> list[str]:
    """The opening tags of the cards that the filter left."""
    cards = re.findall(r"<li(?: id=\"[^\"]*\")?(?: hidden=\"\")?>\s*<(?:a|p) (?!class=\"along)", dom)
    return [card for card in cards if "hidden" not in card]


# ---- as HTML ----


def test_a_run_becomes_pages_in_the_order_of_its_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [f"prompt number {n}" for n in range(25)], failed=[3])
    with ManifestWriter(run, "one") as writer:
        writer.append_bad(BadRow(26, 27, "bad", ("steps 'x' is not a whole number.",)))
    result = ldm_here("gallery", run, "--page-size", "10", "--json")
    assert result.records == [{"path": str(run / "index.html"), "pictures": 24, "failed": 2, "pages": 3}]
    pages = [Reader(run / name) for name in ("index.html", "page-2.html", "page-3.html")]
    prompts = [prompt for page in pages for prompt in page.prompts]
    assert prompts == [f"prompt number {n}" for n in range(25)] + ["(no prompt)"]
    assert "NaN in <U-Net> of 3." in pages[0].text
    assert "steps 'x' is not a whole number." in pages[2].text
    assert "seed 4 · 20 steps · ddim · guidance 7.5 · 48×32 · line 5 · id4 · tag: <i>t</i>" in pages[0].text
    for page in pages:
        assert all((run / link).is_file() for link in page.all("a", "href")), "a link leads nowhere"
        assert all((run / source).is_file() for source in page.all("img", "src"))
        for tag, found in page.tags:
            if tag == "img":
                assert (found["loading"], found["width"], found["height"]) == ("lazy", "48", "32")
                assert found["alt"].startswith("prompt number")
    listed = Reader(run / "prompts.html")
    assert len(listed.prompts) == 26
    assert "page-2.html#p12" in listed.all("a", "href")
    assert all(link.split("#")[0] in ("index.html", "page-2.html", "page-3.html") for link in listed.all("a", "href"))


def test_the_policy_names_what_is_there_and_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    import base64
    import hashlib

    run = make_run(tmp_path / "run", HOSTILE)
    assert ldm_here("gallery", run).code == 0
    page = Reader(run / "index.html")
    policy = next(found["content"] or "" for tag, found in page.tags if "http-equiv" in found)
    assert policy.startswith("default-src 'none'; img-src 'self'")
    for tag in ("style", "script"):
        (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.raw, re.DOTALL)
        assert f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"(?:https?:)?//[a-z]", page.raw)
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "p", "bdi", "div", "label", "input", "span",
        "main", "ol", "li", "a", "img", "footer", "script",
    }  # fmt: skip
    assert not any(name.startswith("on") or name == "style" for _, found in page.tags for name in found)
    assert page.prompts == [visible(prompt) for prompt in HOSTILE]
    assert r"\u202egnp.exe\u2066 \x1b[31m \x07" in page.prompts[4]


def test_pictures_by_any_name_are_shown_and_foreign_ones_said(tmp_path: Path) -> None:
    names = ["a b.png", "c#d.png", "e?f.png", "100%25.png", "q\"'<u>.png", "javascript:alert(1).png", "deep/x&y.png"]
    folder = tmp_path / "some # folder"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(request=recipe(f"prompt of {name}", number)))
    odd = os.fsencode(folder) + b"/odd-\xff.png"
    with open(odd, "wb") as file:
        file.write(picture(request=recipe("odd", 9)))
    (folder / "foreign.png").write_bytes(picture())
    (folder / "text.png").write_text("no picture")
    result = ldm_here("gallery", folder)
    assert "2 pictures carry no readable ldmcli record" in result.err
    found = [os.fsencode(folder) + b"/" + urllib.parse.unquote_to_bytes(s) for s in
             Reader(folder / "index.html").all("img", "src")]  # fmt: skip
    assert sorted(found) == sorted([odd, *(os.fsencode(folder / name) for name in names)])
    elsewhere = tmp_path / "site" / "my pages#1.html"
    assert ldm_here("gallery", folder, "-o", elsewhere, "--page-size", "4").out == os.fsencode(elsewhere) + b"\n"
    page = Reader(elsewhere)
    assert {path.name for path in elsewhere.parent.iterdir()} == {
        "my pages#1.html", "my pages#1-page-2.html", "my pages#1-prompts.html",
    }  # fmt: skip
    for link in (*page.all("img", "src"), *page.all("a", "href")):
        assert os.path.isfile(os.fsencode(elsewhere.parent) + b"/" + urllib.parse.unquote_to_bytes(link)), link


def test_a_manifest_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["one", "two"])
    manifest = run / "manifest" / "one.jsonl"
    line = json.loads(manifest.read_text())
    other = line | {"number": 5, "row": 6, "path": "../../etc/passwd"}
    gone = line | {"number": 6, "row": 7, "path": line["path"].replace("-0.png", "-77.png"), "request": {"width": [1]}}
    redrawn = line | {"status": "failed", "error": "a later attempt"}
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in (line, other, gone, redrawn)) + '{"torn')
    result = ldm_here("gallery", run)
    assert result.code == 0, result
    page = Reader(run / "index.html")
    assert "passwd" not in "".join(page.all("img", "src"))
    assert "is no longer there" in page.text
    assert "a later attempt" not in page.text, "a picture that was drawn stays drawn"


def test_a_shorter_gallery_leaves_no_old_pages_and_foreign_files_stay(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [f"p{n}" for n in range(6)])
    assert ldm_here("gallery", run, "--page-size", "1").code == 0
    assert (run / "page-6.html").is_file()
    (run / "page-7.html").write_text("mine")
    assert ldm_here("gallery", run, "--page-size", "4").code == 0
    assert {path.name for path in run.glob("*.html")} == {"index.html", "page-2.html", "prompts.html", "page-7.html"}
    assert ldm_here("gallery", run).code == 0
    assert {path.name for path in run.glob("*.html")} == {"index.html", "page-7.html"}
    before = (run / "index.html").read_bytes()
    assert ldm_here("gallery", run).code == 0
    assert (run / "index.html").read_bytes() == before
    (run / "index.html").write_text("mine too")
    assert_refused(ldm_here("gallery", run), 73, "index.html", "--output")
    assert (run / "index.html").read_text() == "mine too"


def test_nothing_to_show(tmp_path: Path) -> None:
    assert_refused(ldm_here("gallery", tmp_path / "nowhere"), 66, "no folder")
    (tmp_path / "empty").mkdir()
    assert_refused(ldm_here("gallery", tmp_path / "empty"), 66, "neither")
    assert_refused(ldm_here("gallery", tmp_path, "--page-size", "0"), 2, "page-size")
    assert not list(tmp_path.glob("*.html"))
    (tmp_path / "run" / "manifest").mkdir(parents=True)
    result = ldm_here("gallery", tmp_path / "run")
    assert (result.code, result.err) == (0, "ldm: pictures: 0; failed: 0; pages: 1\n")
    assert "0 pictures" in Reader(tmp_path / "run" / "index.html").text


def test_the_variable_for_where_pictures_go_is_not_for_pages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["a"])
    assert ldm_here("gallery", run, env={"LDM_OUTPUT": str(tmp_path / "pictures")}).out == os.fsencode(
        run / "index.html\n"
    )
    assert not (tmp_path / "pictures").exists()


def test_help_and_pages_need_no_torch(tmp_path: Path) -> None:
    import sys

    run = make_run(tmp_path / "run", ["a"])
    code = (
        "import sys; from pathlib import Path; import ldmcli.cli.gallery; "
        "from ldmcli.gallery.pages import write_gallery; "
        f"write_gallery(Path({str(run)!r})); assert not {{'torch', 'PIL', 'numpy'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_is_unseen_is_spelled_out() -> None:
    assert visible("a\u202eb\u2066c\x1bd\x85e\ufefff\ud800g") == r"a\u202eb\u2066c\x1bd\x85e\ufefff\ud800g"
    assert visible("lines\nand 👩\u200d🚀 می\u200cخواهم") == "lines\nand 👩\u200d🚀 می\u200cخواهم"
    assert visible("x" * 5000).endswith("x… (5,000 characters)")


# ---- in a browser ----


@needs_browser
def test_hostile_prompts_are_inert_in_a_browser(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", HOSTILE, failed=[1])
    ldm_here("gallery", run, "--page-size", "5")
    for name in ("index.html", "page-2.html", "prompts.html"):
        dom, console = browse(run / name, tmp_path / "profile", "--dump-dom")
        assert re.search(r"<title>run( – \d)?</title>", dom)
        assert not re.search(r"<(iframe|svg|textarea|img src=\"x\")", dom)
        assert console == ""
    # That the policy holds even where escaping should fail: the same page with a script put in is not owned either.
    page = (run / "index.html").read_text()
    broken = page.replace("<main>", f"<main><script>{OWNED}</script><img src=x onerror={OWNED}><b id=in></b>")
    (run / "broken.html").write_text(broken)
    dom, console = browse(run / "broken.html", tmp_path / "profile", "--dump-dom")
    assert 'id="in"' in dom
    assert "<title>run – 1</title>" in dom
    assert "Content Security Policy" in console
    # And that this would be seen: without the policy it is.
    (run / "broken.html").write_text(re.sub(r"<meta http-equiv[^>]*>", "", broken))
    assert "<title>owned</title>" in browse(run / "broken.html", tmp_path / "profile", "--dump-dom")[0]


@needs_browser
def test_the_filter_works_in_a_browser(tmp_path: Path) -> None:
    prompts = ["a red apple", "a green pear", "Red APPLE pie", "100% & more", "an apple"]
    run = make_run(tmp_path / "run", prompts)
    ldm_here("gallery", run, "--page-size", "3")
    dom, console = browse(run / "index.html", tmp_path / "profile", "--dump-dom", fragment="#q=apple%20red")
    assert console == ""
    assert len(shown_cards(dom)) == 2
    assert ">2 of 3 on this page<" in dom
    assert "page-2.html#q=apple%20red" in dom, "what is sought goes along to the next page"
    assert "prompts.html#q=apple%20red" in dom
    dom, _ = browse(run / "prompts.html", tmp_path / "profile", "--dump-dom", fragment="#q=apple")
    assert ">3 of 5 on this page<" in dom
    assert len(shown_cards(dom)) == 3
    dom, _ = browse(run / "page-2.html", tmp_path / "profile", "--dump-dom", fragment="#q=100%25%20%26")
    assert ">1 of 2 on this page<" in dom
    dom, console = browse(run / "page-2.html", tmp_path / "profile", "--dump-dom", fragment="#q=%E0%A4%A")
    assert (len(shown_cards(dom)), console) == (2, "")
