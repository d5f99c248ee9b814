"""Prompts in AUTOMATIC1111's syntax that are read plainly: one sentence names the option."""

import pytest

from ldmcli.conditioning.hints import syntax_hint
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
