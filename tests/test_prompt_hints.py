"""Prompts that are not read as they may be meant, and words that the model does not know: one sentence each."""

import shutil
from pathlib import Path

import pytest
from cli_support import assert_refused, ldm_here, tiny_model

from ldmcli.conditioning.hints import syntax_hint
from ldmcli.conditioning.known_words import WordList
from ldmcli.conditioning.syntax import parse


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a (red apple:1.6) here", "“(red apple:1.6)”"), ("a (red apple: 1.6 )", "“(red apple: 1.6 )”"),
        ("a cat BREAK a dog", "“BREAK”"), ("a fox <lora:add_detail:0.8>", "“<lora:add_detail:0.8>”"),
        ("(" + "x" * 1000 + ":.5)", "“(…:.5)”"), ("a <LoRA:x", "“<LoRA:x”"),
    ],
)  # fmt: skip
def test_weighted_syntax_in_a_plain_prompt(prompt: str, shown: str) -> None:
    hint = syntax_hint(prompt)
    assert shown in hint
    assert "--prompt-syntax weighted" in hint


@pytest.mark.parametrize("prompt", ["", "a cat", "(a cat)", "a :1.2) b", "daBREAKer", "at 12:30", "a < b", "[a:b]"])
def test_ordinary_prompts(prompt: str) -> None:
    assert syntax_hint(prompt) == ""


@pytest.mark.parametrize("text", ["(", ":1", ": ", "<lora:", "(:", "BREAK"])
def test_a_megabyte_is_searched_at_once(text: str) -> None:
    assert bool(syntax_hint(text * ((1 << 20) // len(text)))) is (text == "<lora:")
    assert syntax_hint("(" + ":" + " " * (1 << 20)) == ""


@pytest.mark.parametrize("prompt", ["a (red apple: 1.6) b", "a (red apple:1.6 ) b", "a (red apple:\t+1.6\n) b"])
def test_blanks_around_a_weight_are_none_of_it(prompt: str) -> None:
    assert parse(prompt) == parse("a (red apple:1.6) b")
    assert parse("(red apple :1.6)")[0].text == "red apple "
    assert parse("(red apple: 1 .6)")[0].text == "red apple: 1 .6"


# --- words that the model does not know

LIST = "cat\nred apple\npineapple\n\ncat face\njack-o-lantern\n\na\nbackground\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a list of what it knows."""
    folder = shutil.copytree(tiny_model(), tmp_path_factory.mktemp("models") / "fruit")
    (folder / "known_words.txt").write_text(LIST)
    return folder


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red cat", []), ("A Red Cat!", []), ("a cat and the apple, 3 x", []), ("a jack-o-lantern", []),
        ("a zebra, a Zebra on a bleu background", ["zebra", "bleu"]), ("a 🐱", ["🐱"]), ("猫", ["猫"]), ("", []),
    ],
)  # fmt: skip
def test_words_that_are_not_in_the_list(prompt: str, unknown: list[str]) -> None:
    assert WordList(LIST).unknown(prompt) == unknown
    assert WordList("").unknown(prompt) == []


def test_words_of_embeddings_are_known() -> None:
    assert WordList(LIST).unknown("a glow-style zebra", ["<glow-style>"]) == ["zebra"]


def test_the_hint_names_what_is_spelled_alike_first_and_a_few_others() -> None:
    many = WordList("\n".join(f"thing{i}" for i in range(100)) + "\npineapple")
    hint = many.hint("fruit", ["pinaple", "one", "two", "three", "four", "five"], 7)
    assert "does not know “pinaple”, “one”, “two”, “three”, “four” and more in 7 prompts; it knows pineapple, " in hint
    assert hint.count("thing") == 7
    assert "\x1b" not in WordList("a\x1b[31m").hint("fruit\x1b", ["b\x1b"])


def test_a_word_that_the_model_does_not_know_is_remarked_on_once(model: Path, tmp_path: Path) -> None:
    draw = ("-m", model, "--steps", "1", "-s", "1", "-o", tmp_path, "--overwrite")
    done = ldm_here("txt2img", "a cat", "a zebra", "a bleu cat", *draw)
    assert (done.code, len(done.paths)) == (0, 3)
    assert done.err.count("fruit does not know “zebra”; it knows cat, red apple, pineapple and more") == 1
    assert "bleu" not in done.err
    weighted = ldm_here("txt2img", "(a zebra:1.3) BREAK a [cat]", "--prompt-syntax", "weighted", *draw)
    assert "does not know “zebra”; " in weighted.err
    assert ldm_here("txt2img", "a zebra", *draw, "-q").err == ""
    assert "know" not in ldm_here("txt2img", "a red cat", *draw).err
    assert "know" not in ldm_here("txt2img", "a zebra", "-m", tiny_model(), *draw[2:]).err


def test_a_batch_counts_the_prompts_with_words_that_the_model_does_not_know(model: Path, tmp_path: Path) -> None:
    text = "a cat\na zebra\na bleu cat\na zebra\n"
    (tmp_path / "prompts.txt").write_text(text)
    options = ("-m", model, "--steps", "1", "--format", "txt", "-o")
    for number, (source, stdin) in enumerate(((tmp_path / "prompts.txt", b""), ("-", text.encode()))):
        done = ldm_here("batch", source, *options, tmp_path / str(number), stdin=stdin)
        assert (done.code, len(done.paths)) == (0, 4), done.err
        assert done.err.count("fruit does not know “zebra”, “bleu” in 3 prompts; it knows cat") == 1, done.err
    quiet = ldm_here("batch", tmp_path / "prompts.txt", *options, tmp_path / "quiet", "-q")
    assert "know" not in quiet.err


def test_models_lists_the_words(model: Path) -> None:
    env = {"LDM_MODELS": str(model.parent)}
    assert (
        "knows: cat, red apple, pineapple, cat face, jack-o-lantern" in ldm_here("models", "-v", env=env).out.decode()
    )
    assert "red apple" not in ldm_here("models", env=env).out.decode()
    listed = {record["name"]: record["words"] for record in ldm_here("models", "--json", env=env).records}
    assert listed["fruit"] == [line for line in LIST.splitlines() if line]


@pytest.mark.parametrize(("content", "words"), [(b"\xff\xfe", "not UTF-8"), (b"a" * (1 << 20) + b"\n", "over 1 MiB")])
def test_a_damaged_list_is_refused(model: Path, tmp_path: Path, content: bytes, words: str) -> None:
    damaged = shutil.copytree(model, tmp_path / "damaged")
    (damaged / "known_words.txt").write_bytes(content)
    assert_refused(ldm_here("txt2img", "a zebra", "-m", damaged), 65, "known_words.txt", words)
