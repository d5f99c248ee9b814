"""Words that stand for vectors: found in prompts as AUTOMATIC1111 finds them, and kept together in chunks."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmcli.conditioning.chunks import TokenizedPrompt, tokenize
from ldmcli.conditioning.prompts import PromptEncoder, TextEncoder
from ldmcli.conditioning.tokenizer import ClipTokenizer, clip_vocabulary
from ldmcli.conditioning.words import Word, Words, folded
from ldmcli.config import TextEncoderConfig
from ldmcli.errors import BadDataError
from ldmcli.networks.clip import TextTransformer

BOS, EOS, CAT, COMMA = 49406, 49407, 2368, 267


class Row:
    """Vectors, all numbers of which are `value`."""

    def __init__(self, count: int, value: float = 0.5, width: int = 16) -> None:
        self.count, self.value, self.width = count, value, width

    def of_part(self, part: str) -> Tensor:
        return torch.full((self.count, self.width), self.value)


def words_of(**counts: int) -> Words:
    return named({name.replace("_", "-"): count for name, count in counts.items()})


def named(counts: Mapping[str, int]) -> Words:
    return {folded(name): Word(name, lambda count=count: Row(count)) for name, count in counts.items()}  # type: ignore[misc]


@pytest.fixture(scope="module", params=["CLIP", "OpenCLIP"])
def tokenizer(request: pytest.FixtureRequest) -> ClipTokenizer:
    return ClipTokenizer(clip_vocabulary(), 77, cleaned=request.param == "OpenCLIP")


def texts(found: TokenizedPrompt) -> list[str]:
    """Each chunk as c for cat, a comma, the number of a vector, and . for other tokens."""
    signs = {CAT: "c", COMMA: ","}
    shown = [
        [str(-1 - i) if i < 0 else signs.get(i, ".") for i in chunk.ids if i not in (BOS, EOS)]
        for chunk in found.chunks
    ]
    return [" ".join(signs) for signs in shown]


@pytest.mark.parametrize(
    ("prompt", "expected", "used"),
    [
        ("cat zoomtoy cat", "c 0 1 2 c", ["zoomtoy"]),
        ("cat ZoomToy,cat", "c 0 1 2 , c", ["zoomtoy"]),
        ("zoomtoy zoomtoy", "0 1 2 0 1 2", ["zoomtoy"]),
        ("cat-zoomtoy's", "c . 0 1 2 .", ["zoomtoy"]),
        ("zoomtoy zoomtoy 2", "0 1 2 3 4", ["zoomtoy", "ZoomToy 2"]),  # the longest counts
        ("zoomtoy2 zoomtoy", "0 1 2 3 4", ["ZoomToy 2", "zoomtoy"]),
        ("cat bad-cat-5!", "c 0 .", ["bad-cat-5"]),
        ("Bad - CAT - 5", "0", ["bad-cat-5"]),
        ("cat <new>, <NEW>cat", "c 0 1 , 0 1 c", ["<new>"]),
        ("", "", []),
    ],
)
def test_a_word_is_found_by_its_tokens(tokenizer: ClipTokenizer, prompt: str, expected: str, used: list[str]) -> None:
    words = named({"zoomtoy": 3, "ZoomToy 2": 2, "bad-cat-5": 1, "<new>": 2})
    found = tokenize(tokenizer, prompt, words=words)
    assert texts(found) == [expected]
    assert [word.text for word in found.words] == used


def test_a_part_of_a_longer_word_is_none(tokenizer: ClipTokenizer) -> None:
    prompt = "cat zoomtoys xzoomtoy, <new"
    assert tokenize(tokenizer, prompt, words=named({"zoomtoy": 3, "<new>": 2})) == tokenize(tokenizer, prompt)


def test_words_across_weights_and_brackets(tokenizer: ClipTokenizer) -> None:
    words = named({"zoomtoy": 3, "toy (new)": 1})
    found = tokenize(tokenizer, r"cat (zoomtoy:1.5) [toy \(new\)] BREAK zoomtoy", syntax="weighted", words=words)
    assert texts(found) == ["c 0 1 2 3", "0 1 2"]
    assert found.chunks[0].weights[:6] == (1.0, 1.0, 1.5, 1.5, 1.5, 1 / 1.1)
    assert set(found.chunks[1].weights) == {1.0}
    assert not tokenize(tokenizer, "zoom(toy:1.5)", syntax="weighted", words=words).words  # as in A1111


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("cat " * 72 + "zoomtoy", [75]),
        ("cat " * 73 + "zoomtoy cat", [73, 4]),
        ("cat " * 74 + "zoomtoy", [74, 3]),
        ("cat " * 70 + ", " + "cat " * 2 + "zoomtoy", [73, 3]),  # not full: the comma takes nothing along
        ("cat " * 70 + ", cat zoomtoy cat", [71, 5]),  # full: what follows the comma goes along, whole
        ("cat " * 56 + ", " + "zoomtoy " * 7, [57, 21]),
        ("cat " * 50 + ", " + "zoomtoy " * 9, [75, 3]),  # the comma is too far back
        ("cat, " * 30 + "long", [60, 75]),
    ],
)
def test_vectors_of_a_word_are_never_in_two_chunks(tokenizer: ClipTokenizer, prompt: str, expected: list[int]) -> None:
    words = words_of(zoomtoy=3, long=75)
    found = tokenize(tokenizer, prompt, chunked=True, words=words)
    assert [sum(i not in (BOS, EOS) for i in chunk.ids) for chunk in found.chunks] == expected
    assert all(len(chunk.ids) == len(chunk.weights) == 77 for chunk in found.chunks)
    assert "".join(texts(found)).replace(" ", "").count("012") == prompt.count("zoomtoy") + prompt.count("long")


@pytest.mark.parametrize("syntax", ["plain", "weighted"])
def test_a_word_that_does_not_fit_is_cut_off_whole(tokenizer: ClipTokenizer, syntax: str) -> None:
    words = words_of(zoomtoy=3)
    fits = tokenize(tokenizer, "cat " * 72 + "zoomtoy", syntax=syntax, words=words)
    assert (fits.cut_text, len(fits.words)) == ("", 1)
    cut = tokenize(tokenizer, "cat " * 73 + "zoomtoy cat", syntax=syntax, words=words)
    assert (cut.cut_text.strip(), cut.words) == ("zoomtoy cat", ())
    assert texts(cut) == [" ".join("c" * 73)]


def test_only_words_that_occur_are_asked_for(tokenizer: ClipTokenizer) -> None:
    def fail() -> Any:
        raise BadDataError("damaged.")

    words = {name: Word(name, fail) for name in ("zoomtoy", "cat", "photograph")}
    assert not tokenize(tokenizer, "a catalogue of photographs", words=words).words
    with pytest.raises(BadDataError, match="damaged"):
        tokenize(tokenizer, "a cat", words=words)


# ---- the text encoder ----


@pytest.fixture(scope="module")
def encoder(one_thread: None) -> TextEncoder:
    """An encoder that pools at the highest id, as those of published configurations do."""
    torch.manual_seed(0)
    config = TextEncoderConfig(
        hidden_size=16, intermediate_size=32, layers=3, heads=2, final_norm=False, projection_dim=6, eos_token_id=2
    )
    return TextEncoder(TextTransformer(config).requires_grad_(False).eval(), ClipTokenizer(clip_vocabulary(), 77))


def test_vectors_are_read_as_tokens_are(encoder: TextEncoder) -> None:
    """The table's own rows under another word give the numbers of the words they are of, pooled ones included."""

    class Rows:
        count = 2

        def of_part(self, part: str) -> Tensor:
            return encoder.model.embeddings.token_embedding.weight[[CAT, COMMA]]

    word = Word("zoomtoy", Rows)
    prompts = PromptEncoder([encoder])
    for syntax, prompt in (("plain", "a {} on a table"), ("weighted", "a ({}:1.3) BREAK {}")):
        for clip_skip in (1, 2):
            asked: dict[str, Any] = {"syntax": syntax, "clip_skip": clip_skip}
            (ours,) = prompts.encode([prompt.replace("{}", "zoomtoy")], words={"zoomtoy": word}, **asked)
            (plain,) = prompts.encode([prompt.replace("{}", "cat,")], **asked)
            assert torch.equal(ours.context, plain.context)
            assert ours.pooled is not None
            assert plain.pooled is not None
            assert torch.equal(ours.pooled, plain.pooled)


def test_a_prompt_is_held_with_its_embeddings(encoder: TextEncoder) -> None:
    prompts = PromptEncoder([encoder])
    one, other = ({"zoomtoy": Word("zoomtoy", lambda value=value: Row(2, value))} for value in (0.5, -0.5))  # type: ignore[misc]
    calls: list[int] = []
    handle = encoder.model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    found = [prompts.encode(["zoomtoy", "cat"], words=words) for words in (one, other, {}, one)]
    handle.remove()
    assert len(calls) == 4  # zoomtoy in three meanings, and cat in one
    states = [of_words[0].context for of_words in found]
    assert torch.equal(states[0], states[3])
    assert all(not torch.equal(states[i], states[j]) for i in range(3) for j in range(i))
    assert all(torch.equal(of_words[1].context, found[0][1].context) for of_words in found)
