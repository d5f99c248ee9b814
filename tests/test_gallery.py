"""`ldm gallery`: what a batch run and a folder of pictures look like as pages, read as HTML and in a real browser.

The browser is Chromium where it is installed; its tests skip themselves where it is not.
"""

import html.parser
import json
import os
import re
import shlex
import subprocess
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from browser_support import CHROMIUM, Browser, browser
from cli_support import assert_refused, ldm_here, pixels, tiny_model, until

from ldmcli.batch.items import BadRow, Item, Outcome
from ldmcli.batch.manifest import ManifestWriter
from ldmcli.batch.pictures import picture_path
from ldmcli.cli import cli
from ldmcli.cli.options import request_settings
from ldmcli.gallery.html import visible
from ldmcli.gallery.redraw import command
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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


def shown(page: Browser) -> list[str]:
    """The anchors of the cards that the filter left."""
    return page.run("[...document.querySelectorAll('.cards > li')].filter((c) => !c.hidden).map((c) => c.id)")


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
    settings = "seed 4 settings size 48×32 seed 4 steps 20 sampler ddim guidance scale 7.5 line 5 id id4 tag <i>t</i>"
    assert settings in " ".join(pages[0].text.split())
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
        "main", "ol", "li", "a", "img", "footer", "script", "details", "summary", "dl", "dt", "dd", "code", "button",
        "dialog", "figure", "section", "kbd",
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
def test_hostile_prompts_are_inert_in_a_browser(tmp_path: Path, page: Browser) -> None:
    run = make_run(tmp_path / "run", HOSTILE, failed=[1])
    ldm_here("gallery", run, "--page-size", "5")
    page.messages.clear()
    for name in ("index.html", "page-2.html", "prompts.html"):
        page.open(run / name)
        if name == "index.html":
            for _ in HOSTILE:
                page.press("ArrowRight", "Enter", "c", "ArrowRight", "y", "Escape")
        assert re.fullmatch(r"run( – \d)?", page.run("document.title"))
        assert page.run("document.querySelectorAll('iframe, svg, textarea, img[src=x]').length") == 0
        assert page.messages == []
    # That the policy holds even where escaping should fail: the same page with a script put in is not owned either.
    text = (run / "index.html").read_text()
    broken = text.replace("<main>", f"<main><script>{OWNED}</script><img src=x onerror={OWNED}><b id=in></b>")
    (run / "broken.html").write_text(broken)
    page.open(run / "broken.html")
    assert page.run("[document.title, !!document.getElementById('in')]") == ["run – 1", True]
    assert "Content Security Policy" in "".join(page.messages)
    # And that this would be seen: without the policy it is.
    (run / "broken.html").write_text(re.sub(r"<meta http-equiv[^>]*>", "", broken))
    page.open(run / "broken.html")
    assert page.run("document.title") == "owned"


@needs_browser
def test_the_filter_finds_words_and_fields(tmp_path: Path, page: Browser) -> None:
    prompts = ["a red apple", "a green pear", "Red APPLE pie", "100% & more", "an apple"]
    run = make_run(tmp_path / "run", prompts)
    ldm_here("gallery", run, "--page-size", "3")
    page.messages.clear()
    page.open(run / "index.html", "#q=apple%20red")
    assert shown(page) == ["p0", "p2"]
    assert page.run("document.getElementById('found').textContent") == "2 of 3 on this page"
    links = page.run("[...document.querySelectorAll('a.along')].map((link) => link.hash)")
    assert set(links) == {"#q=apple%20red"}, "what is sought goes along to the next page"
    for sought, found in {
        "seed:1": ["p1"], "seed>0 apple": ["p2"], "seed<2": ["p0", "p1"], "steps:20": ["p0", "p1", "p2"], "id=id": [],
        "id:id2": ["p2"], 'sampler:"ddim"': ["p0", "p1", "p2"], "sampler:euler": [], "12:30": [],
        '"red apple"': ["p0", "p2"], "tag:<i>": ["p0", "p1", "p2"],
    }.items():  # fmt: skip
        page.open(run / "index.html", "#q=" + urllib.parse.quote(sought))
        assert shown(page) == found, sought
    page.open(run / "prompts.html", "#q=apple%20seed%3E0")
    assert page.run("document.getElementById('found').textContent") == "2 of 5 on this page"
    page.open(run / "page-2.html", "#q=100%25%20%26")
    assert shown(page) == ["p3"]
    page.open(run / "page-2.html", "#q=%E0%A4%A")
    assert len(shown(page)) == 2
    assert page.messages == []


@pytest.fixture(scope="module")
def gridded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two prompts, each in four ways, on three pages."""
    folder = tmp_path_factory.mktemp("gridded")
    (folder / "p.txt").write_text("a cat\nan 'owl'\n")
    grid = ("--grid", "eta=0,0.5", "--grid", "steps=1,2", "--sampler", "ddim", "-n", "fog", "--dtype", "fp32")
    result = ldm_here("batch", folder / "p.txt", "-m", tiny_model(), "-o", folder / "run", *grid)
    assert result.code == 0, result
    assert ldm_here("gallery", folder / "run", "--page-size", "3").code == 0
    return folder / "run"


@needs_browser
def test_menus_filter_by_what_varies(gridded: Path, page: Browser) -> None:
    page.open(gridded / "index.html")
    menus = page.run("[...document.querySelectorAll('.filter select')].map((m) => m.name)")
    assert set(menus) >= {"eta", "steps"}
    assert "sampler" not in menus
    menu = "document.querySelector('select[name=steps]')"
    page.run(f"{menu}.value = '2', {menu}.dispatchEvent(new Event('change'))")
    assert page.run("document.getElementById('q').value") == "steps:2"
    assert shown(page) == ["p1"]
    page.run(f"{menu}.value = '', {menu}.dispatchEvent(new Event('change'))")
    assert len(shown(page)) == 3


@needs_browser
def test_one_picture_and_two_by_keyboard(gridded: Path, page: Browser) -> None:
    page.messages.clear()
    page.open(gridded / "index.html")
    page.press("ArrowRight", "ArrowRight", "Enter")
    facts = "document.getElementById('facts').innerText"
    place = "document.getElementById('place').textContent"
    assert page.run(place) == "2 of 3"
    assert "steps" in page.run(facts)
    assert page.run("document.querySelector('#one img').getAttribute('src')").endswith("-1.png")
    page.press("c", "ArrowLeft")
    assert page.run("document.querySelectorAll('.stage figure:not([hidden]) img').length") == 2
    assert page.run(facts).split() == ["steps", "2", "1"], "of two, what is not the same"
    page.press("c", "End")
    assert page.run(place) == "3 of 3"
    with page.loading():
        page.press("ArrowRight")
    assert page.run("location.pathname.split('/').pop()") == "page-2.html"
    assert page.run(place) == "1 of 3", "the first of the next page is open"
    page.press("Escape")
    assert page.run("document.getElementById('view').open") is False
    until(lambda: page.run("document.activeElement.closest('li')?.id") == "p3", "the picture's card has the focus")
    page.press("/")
    assert page.run("document.activeElement.id") == "q"
    assert page.messages == []


@needs_browser
@pytest.mark.parametrize(("width", "height", "mobile"), [(1280, 800, False), (390, 844, True)])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_desktop_and_a_phone_by_day_and_by_night(
    gridded: Path, page: Browser, width: int, height: int, mobile: bool, dark: bool
) -> None:
    page.size(width, height, mobile=mobile, dark=dark)
    page.open(gridded / "index.html")
    wide = "document.documentElement.scrollWidth"
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.run(wide) <= width
    assert page.run(paper) == ("rgb(22, 22, 24)" if dark else "rgb(255, 255, 255)")
    page.run("document.querySelector('.cards a').click()")
    seen = page.run(
        "(({width, height}) => [width, height])(document.querySelector('#one img').getBoundingClientRect())"
    )
    assert min(seen) > 300, "a picture is large"
    facts = page.run("document.getElementById('facts').getBoundingClientRect().left")
    assert facts < 50 if mobile else facts > 800, "settings are beside it, or below"
    assert page.run("document.getElementById('view').scrollWidth") <= width
    page.size(1280, 800)


@needs_browser
def test_the_copied_command_draws_the_picture_again(gridded: Path, page: Browser, tmp_path: Path) -> None:
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.open(gridded / "page-3.html")
    page.press("ArrowRight", "ArrowRight", "Enter")
    assert page.run("document.querySelector('#facts .copy').hidden") is False
    page.press("y")
    typed = page.run("navigator.clipboard.readText()")
    picture = gridded / page.run("document.querySelector('#one img').getAttribute('src')")
    assert "'an '\"'\"'owl'\"'\"''" in typed
    words = shlex.split(typed)
    assert words.pop(0) == "ldm"
    again = ldm_here(*words, "--dtype", "fp32", "-o", tmp_path / "again.png")
    assert np.array_equal(pixels(again.paths[0]), pixels(picture))


# ---- commands ----

REQUESTS = {
    "usual": GenerationRequest("a cat", seed=7),
    "a dash": GenerationRequest("-v", seed=7, negative_prompt="--x"),
    "settings": GenerationRequest(
        "a 'cat'\n", seed=2**64 - 1, steps=5, guidance_scale=7.25, width=512, height=640, sampler="ddim", eta=0.1,
        schedule="trailing", guidance_rescale=0.7, guidance_interval=(0.28, 5.42), clip_skip=2, on_long_prompt="chunk",
        prompt_syntax="weighted", original_width=9, original_height=8, crop_left=1, crop_top=2, refiner_start=0.5,
        loras=({"name": "a b", "weight": 0.3}, {"name": "in", "in_prompt": True}), embeddings=("w.pt:w",),  # type: ignore[arg-type]
    ),
    "a picture": GenerationRequest(
        "a cat", image="a.png", strength=0.6, mask="alpha", mask_blur=4.5, invert_mask=True, paste_back=False,
        resize="crop", masked_content="noise", inpaint_area="masked", mask_padding=9, depth="d.png",
        image_guidance_scale=1.1, hires="2", hires_strength=0.3, hires_steps=3, hires_upscaler="lanczos",
    ),
    "what steers": GenerationRequest(
        "a cat", control_net=("c", "d"), control_image=("a.png", "b.png"), control_strength=(0.5, 1.0),
        control_start=(0.1,), control_end=(0.9,), control_mode=("guess", "balanced"), control_type=("canny",),
        canny=("100,200", "off"), ip_adapter=("i",), ip_adapter_image=("a.png",), ip_adapter_strength=(0.4,),
        ip_adapter_mask=("m.png",), ip_adapter_blocks=("style",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_a_command_says_the_whole_request(name: str) -> None:
    asked = REQUESTS[name]
    model = {"name": "m", "path": "/m m", "sha256": "", "vae": "v", "upscaler": "u", "embeddings": []}
    words = shlex.split(command(asked.to_dict(), model))
    assert words[:2] == ["ldm", "img2img" if asked.image else "txt2img"]
    found = cli.get_command(None, words[1])  # type: ignore[arg-type]
    assert found is not None
    options = found.make_context(words[1], words[2:]).params
    assert (options["model"], options["vae"], options["upscaler"]) == ("/m m", "v", "u")
    read = GenerationRequest(*options["prompts"], seed=options["seed"], **request_settings(options))
    kept = [lora for lora in asked.loras if not lora.in_prompt]
    assert read.to_dict() == asked.to_dict() | ({"loras": [vars(one) for one in kept]} if kept else {})


def test_what_cannot_be_typed_has_no_command() -> None:
    assert command({"prompt": "a cat", "seed": -5}, {}) == ""
    assert command({"prompt": "a cat", "steps": [1]}, {}) == ""
    assert command({"prompt": "a cat", "image": "-"}, {}) == ""
    assert command({"prompt": "a cat", "control_net": ["c"], "control_image": ["-"]}, {}) == ""
    assert command({"prompt": "-"}, {}) == ""
    assert command({}, {"path": "m"}) == ""
