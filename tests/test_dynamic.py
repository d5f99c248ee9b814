"""Prompts drawn by lot: the notation, the same draw everywhere, what cannot be meant; in both commands."""

import collections
from pathlib import Path

import pytest
from batch_support import batch, manifest
from cli_support import assert_refused, ldm_here, tiny_model

from ldmcli.conditioning.dynamic import DynamicPrompts
from ldmcli.errors import LdmError, UsageError
from ldmcli.images.metadata import read_record
from ldmcli.spec import GenerationRequest


@pytest.fixture
def wildcards(tmp_path: Path) -> Path:
    folder = tmp_path / "wildcards"
    (folder / "animals").mkdir(parents=True)
    (folder / "colour.txt").write_text("# colours\nred\n\nblue # of the sky\n{light|dark} green\n")
    (folder / "animals" / "small.txt").write_text("\ufeffmouse\r\n__colour__ ant\r\n")
    (folder / "loop.txt").write_text("a __loop2__\n")
    (folder / "loop2.txt").write_text("b __loop__\n")
    (folder / "empty.txt").write_text("# nothing\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    for i in range(9):
        (folder / f"many{i}.txt").write_text(" ".join([f"__many{i + 1}__"] * 10))
    (folder / "many9.txt").write_text("x")
    return folder


def outcomes(prompt: str, folder: Path | None = None) -> set[str]:
    draws = DynamicPrompts(folder)
    return {draws.draw(prompt, seed) for seed in range(300)}


@pytest.mark.parametrize(
    ("prompt", "drawn"),
    [
        ("a {red|green} cat", {"a red cat", "a green cat"}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{2$$a|b}", {"a, b", "b, a"}),
        ("{5$$a|b}", {"a, b", "b, a"}),
        ("{1-2$$ and $$a|b}", {"a", "b", "a and b", "b and a"}),
        ("{2-$$a|b}", {"a, b", "b, a"}),
        ("{|a}", {"", "a"}),
        ("{0::a|b}", {"b"}),
        ("x|y}", {"x|y}"}),
        ("\\{a\\|b\\} {a\\|b}", {"{a|b} a|b"}),
        ("50% $5, # (red:1.3), [b], <lora:x:1>, \\(c\\)", {"50% $5, # (red:1.3), [b], <lora:x:1>, \\(c\\)"}),
        ("__colour__", {"red", "blue", "light green", "dark green"}),
        ("__animals/small__", {"mouse", "red ant", "blue ant", "light green ant", "dark green ant"}),
        ("{2$$__colour__}", {
            f"{a}, {b}" for a in ("red", "blue", "light green", "dark green")
            for b in ("red", "blue", "light green", "dark green") if a.split()[-1] != b.split()[-1]}),
        ("\\__colour__, a __ b __, __init", {"__colour__, a __ b __, __init"}),
    ],
)  # fmt: skip
def test_what_may_come_out(prompt: str, drawn: set[str], wildcards: Path) -> None:
    assert outcomes(prompt, wildcards) == drawn


def test_weights_and_evenness() -> None:
    draws = DynamicPrompts(None)
    counts = collections.Counter(draws.draw("{3::a|1::b}", seed) for seed in range(2000))
    assert 1350 < counts["a"] < 1650


def test_a_seed_draws_the_same_everywhere_and_another_for_the_negative_prompt() -> None:
    letters = "{" + "|".join("abcdefghijklmnop") + "}"
    request = GenerationRequest(letters * 4, letters * 4, seed=5)
    drawn = DynamicPrompts(None).drawn(request)
    assert drawn == DynamicPrompts(None).drawn(request)
    assert (drawn.prompt, drawn.negative_prompt) == ("lfnl", "fgne")
    assert DynamicPrompts(None).drawn(GenerationRequest("a cat")) == GenerationRequest("a cat")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("{a|b", "is not closed"),
        ("{" * 60 + "}" * 60, "more than 50 braces"),
        ("{e$$a|b}", "no part of --dynamic-prompts"),
        ("${x=a}", "no part of --dynamic-prompts"),
        ("{2-1$$a|b}", "choose nothing"),
        ("{0::a}", "choose nothing"),
        ("{a|__missing__}", "missing.txt does not exist"),
        ("__../colour__", "no name of a file"),
        ("__/etc/passwd__", "no name of a file"),
        ("__colour*__", "no name of a file"),
        ("__loop__", "leads to itself"),
        ("__empty__", "has no lines"),
        ("__latin__", "not UTF-8"),
        ("__many0__", "draws too much"),
    ],
)
def test_what_cannot_be_meant_is_refused_whatever_is_drawn(prompt: str, words: str, wildcards: Path) -> None:
    for seed in range(3):
        with pytest.raises(LdmError, match=words):
            DynamicPrompts(wildcards).draw(prompt, seed)
    with pytest.raises(UsageError, match="give --wildcard-dir"):
        DynamicPrompts(None).draw("__colour__", 1)


# ---- the commands ----


def test_each_picture_has_a_prompt_of_its_seed(tmp_path: Path, wildcards: Path) -> None:
    fine = ("--dynamic-prompts", "--wildcard-dir", wildcards, "-m", tiny_model(), "--steps", "1", "-q", "--json")
    prompt = "{a|b|c|d} __colour__"
    many = ldm_here("txt2img", prompt, "-n", "{x|y}", "-s", "3", "-c", "3", "-o", tmp_path / "out", *fine)
    assert many.code == 0, many.err
    draws = DynamicPrompts(wildcards)
    assert [one["prompt"] for one in many.records] == [draws.draw(prompt, seed) for seed in (3, 4, 5)]
    assert [one["negative_prompt"] for one in many.records] == [
        draws.draw("{x|y}", seed, "negative prompt") for seed in (3, 4, 5)
    ]
    alone = ldm_here("txt2img", prompt, "-n", "{x|y}", "-s", "4", "-o", tmp_path / "one.png", *fine)
    assert alone.records[0]["prompt"] == many.records[1]["prompt"]
    assert read_record(tmp_path / "one.png")["request"]["prompt"] == alone.records[0]["prompt"]
    again = ldm_here("txt2img", "--from-image", tmp_path / "one.png", "-o", tmp_path / "two.png", *fine[:1], "-q")
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "one.png").read_bytes(), again.err


def test_rows_draw_by_their_seed_and_the_manifest_says_what_from(tmp_path: Path, wildcards: Path) -> None:
    rows = tmp_path / "p.txt"
    rows.write_text("{a|b|c|d} fox\na cat\n__missing__\n")
    arguments = (rows, "-o", tmp_path / "out", "--dynamic-prompts", "--wildcard-dir", wildcards, "-c", "2", "-s", "1")
    assert batch(*arguments).code == 3
    done = {one["number"]: one for one in manifest(tmp_path / "out") if one["status"] == "done"}
    for number in (0, 1):
        request = done[number]["request"]
        assert request["prompt"] == DynamicPrompts(None).draw("{a|b|c|d} fox", request["seed"])
        assert done[number]["extra"] == {"template": "{a|b|c|d} fox"}
    assert done[2]["extra"] == {}
    (failed,) = [one for one in manifest(tmp_path / "out") if one["status"] == "failed"]
    assert "missing.txt does not exist" in failed["error"]
    again = batch(*arguments)
    assert again.out == b""  # all is done
    plain = batch(rows, "-o", tmp_path / "out", "-c", "2", "-s", "1")
    assert_refused_run(plain.code, plain.err, "dynamic_prompts")


def test_kohyas_lines_are_drawn_by_lot_as_theirs_are(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a {red|green|blue} fox --n {x|y} --d 5\n")
    drawn = batch(tmp_path / "p.txt", "-o", tmp_path / "out", "--format", "kohya")
    assert drawn.code == 0
    assert "warning" not in drawn.err
    ((request, extra),) = [(one["request"], one["extra"]) for one in manifest(tmp_path / "out")]
    assert request["prompt"] == DynamicPrompts(None).draw("a {red|green|blue} fox", 5)
    assert request["negative_prompt"] in ("x", "y")
    assert extra["template"] == "a {red|green|blue} fox"


def test_another_content_of_a_wildcard_is_another_run(tmp_path: Path, wildcards: Path) -> None:
    rows = tmp_path / "p.txt"
    rows.write_text("__colour__ fox\n")
    arguments = (rows, "-o", tmp_path / "out", "--dynamic-prompts", "--wildcard-dir", wildcards)
    assert batch(*arguments).code == 0
    (wildcards / "colour.txt").write_text("black\n")
    changed = batch(*arguments)
    assert_refused_run(changed.code, changed.err, "wildcards.colour")


def assert_refused_run(code: int, err: str, word: str) -> None:
    assert code == 65, err
    assert word in err


@pytest.mark.parametrize("prompt", ["a {red|green} cat", "a __colour__ cat"])
@pytest.mark.parametrize("syntax", ["plain", "weighted"])
def test_the_notation_is_remarked_on_where_it_is_text(tmp_path: Path, prompt: str, syntax: str) -> None:
    out = ldm_here(
        "txt2img", prompt, "--prompt-syntax", syntax, "-m", tiny_model(), "--steps", "1", "-o", tmp_path / "a.png"
    )
    assert out.code == 0
    assert out.err.count("--dynamic-prompts draws it by lot") == 1
    assert_refused(
        ldm_here("txt2img", "{a", "--dynamic-prompts", "-m", tiny_model(), "-o", tmp_path / "b.png"), 2, "not closed"
    )
