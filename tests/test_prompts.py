"""Weighted prompts, chunks and conditioning do what AUTOMATIC1111's web UI does."""

import contextlib
import itertools
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import read
from torch import Tensor

from ldmcli.conditioning.chunks import TokenizedPrompt, tokenize
from ldmcli.conditioning.prompts import PromptEncoder, emphasized
from ldmcli.conditioning.syntax import Piece, parse
from ldmcli.conditioning.tokenizer import ClipTokenizer, clip_vocabulary
from ldmcli.config import TextEncoderConfig
from ldmcli.errors import BadDataError, LdmError, UsageError
from ldmcli.networks.clip import TextTransformer

CAT, COMMA, BOS, EOS = 2368, 267, 49406, 49407
UP, DOWN = 1.1, 1 / 1.1

# ---- syntax ----

# A1111's own examples (modules/prompt_parser.py), then what else it takes; floats to the last bit.
PARSED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", UP), (" word", 1.0)],
    "(unbalanced": [("unbalanced", UP)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", UP)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        *(("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55)),
        *((", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1)),
    ],
    "": [("", 1.0)],
    "()": [("", 1.0)],
    "((cat))": [("cat", UP * UP)],
    "[cat]": [("cat", DOWN)],
    "[[cat]": [("cat", DOWN * DOWN)],
    "(cat:0)": [("cat", 0.0)],
    "(cat:-1.5) a": [("cat", -1.5), (" a", 1.0)],
    "(cat:+.5)": [("cat", 0.5)],
    "(cat:2.)": [("cat", 2.0)],
    "(a ratio of 16:9)": [("a ratio of 16", 9.0)],
    "(a ratio of 16 : 9 )": [("a ratio of 16 ", 9.0)],
    "[cat:1.3]": [("cat:1.3", DOWN)],
    "a: cat:1.3) b)]": [("a: cat:1.3) b)]", 1.0)],
    "(a [b) c]": [("a ", UP), ("b", UP * DOWN), (" c", DOWN)],
    r"\\(cat\)": [("\\", 1.0), ("cat)", UP)],
    r"a\b \( \[ \) \] \\": [(r"ab ( [ ) ] " + "\\", 1.0)],
    "(a)(b:1.1)": [("ab", UP)],
    "BREAKFAST BREAKs": [("BREAKFAST BREAKs", 1.0)],
    "break": [("break", 1.0)],
    "a BREAK b": [("a", 1.0, False), ("b", 1.0, True)],
    "a,\n BREAK\t, b": [("a,", 1.0, False), (", b", 1.0, True)],
    "BREAK a": [("", 1.0, False), ("a", 1.0, True)],
    "a BREAK": [("a", 1.0, False), ("", 1.0, True)],
    "a BREAK BREAK b": [("a", 1.0, False), ("", 1.0, True), ("b", 1.0, True)],
    "(a)BREAK(b:2)": [("a", UP, False), ("", 1.0, False), ("", 1.0, True), ("b", 2.0, False)],
    # A1111 makes a word of this one.
    "(a BREAK b:2) c": [("a", 2.0, False), ("b", 2.0, True), (" c", 1.0, False)],
}


@pytest.mark.parametrize(("prompt", "pieces"), PARSED.items())
def test_parsing(prompt: str, pieces: list[tuple[Any, ...]]) -> None:
    assert parse(prompt) == [Piece(*piece) for piece in pieces]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("(cat:1.2.3)", "“1.2.3” in a prompt is no weight"),
        ("(and so on:...)", "is no weight"),
        ("(cat:" + "9" * 400 + ")", "is no weight"),
        ("((cat:" + "9" * 200 + "):" + "9" * 200 + ")", "not finite"),
        ("(" * 65, "more than 64 deep"),
        ("([" * 33, "more than 64 deep"),
    ],
)
def test_refused_weights(prompt: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse(prompt)
    assert len(str(caught.value)) < 200


MARKS = ["(", ")", "[", "]", "\\", ":", ":1.3)", ":-.5)", "1", ".", " ", "BREAK", "a", ","]
PROMPTS = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=3))).map("".join))


@settings(max_examples=300, deadline=None)
@given(prompt=PROMPTS)
def test_any_text_parses(prompt: str) -> None:
    try:
        pieces = parse(prompt)
    except LdmError:
        return
    assert pieces
    assert not pieces[0].after_break
    assert all(a.weight != b.weight or b.after_break for a, b in itertools.pairwise(pieces))
    if not set(prompt) & set("()[]\\") and "BREAK" not in prompt:
        assert pieces == [Piece(prompt, 1.0)]


@settings(deadline=None)
@given(text=PROMPTS.filter(lambda text: "BREAK" not in text), weight=st.floats(-10, 10).map(lambda w: round(w, 3)))
def test_escaped_text_comes_back(text: str, weight: float) -> None:
    escaped = "".join("\\" + char if char in "()[]\\" else char for char in text)
    assert parse(escaped) == [Piece(text, 1.0)]
    assert parse(f"({escaped}:{weight:.3f})") == [Piece(text, weight if text else 1.0)]


@pytest.mark.parametrize("start", ["", "(a:", "(" * 60])
def test_hostile_prompts_are_parsed_in_time(start: str) -> None:
    """A tenth of a second or so; anything quadratic would take minutes."""
    started = time.process_time()
    for unit in (*"()[\\:1 ", "([", "(a)", "(a:1.1)[b]", "\\(", ":1", "BREAK ", " BREAK", "(:", "a(a)[", "(\\"):
        with contextlib.suppress(LdmError):
            parse(start + unit * (100_000 // len(unit)))
    assert time.process_time() - started < 20


# ---- chunks ----


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer(clip_vocabulary(), 77)


def words(found: TokenizedPrompt) -> list[int]:
    """How many tokens each chunk has between its marks."""
    return [chunk.ids.index(EOS) - 1 for chunk in found.chunks]


def test_plain_is_one_chunk_of_weight_1(tokenizer: ClipTokenizer) -> None:
    for prompt in ("", "a (cat:1.3) BREAK [dog]", "cat, " * 50):
        found = tokenize(tokenizer, prompt)
        (chunk,) = found.chunks
        assert len(chunk.ids) == 77
        assert chunk.weights == (1.0,) * 77
        assert prompt.endswith(found.cut_text)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [0]),
        ("cat " * 75, [75]),
        ("cat " * 76, [75, 1]),
        ("cat " * 151, [75, 75, 1]),
        # A comma among the last 20 tokens of a full chunk ends it, once more text comes.
        ("cat " * 55 + ", " + "cat " * 19, [75]),
        ("cat " * 55 + ", " + "cat " * 20, [56, 20]),
        ("cat " * 54 + ", " + "cat " * 21, [75, 1]),
        ("cat " * 74 + ", cat", [75, 1]),
        ("cat " * 60 + ", " + "cat " * 5 + ", " + "cat " * 9, [67, 9]),
        # A comma that opens a chunk is left alone, and what precedes it too.
        ("cat " * 60 + ", " + "cat " * 14 + ", cat", [75, 2]),
        ("cat " * 75 + ", " + "cat " * 75, [75, 75, 1]),
    ],
)
def test_chunks(tokenizer: ClipTokenizer, prompt: str, expected: list[int]) -> None:
    found = tokenize(tokenizer, prompt, chunked=True)
    assert words(found) == expected
    assert found.cut_text == ""
    assert [i for chunk in found.chunks for i in chunk.ids if i not in (BOS, EOS)] == tokenizer.tokens(prompt).ids
    for chunk in found.chunks:
        assert (chunk.ids[0], chunk.ids[-1]) == (BOS, EOS)
        assert len(chunk.ids) == len(chunk.weights) == 77


@pytest.mark.parametrize("chunked", [False, True])
def test_weights_stand_beside_their_tokens(tokenizer: ClipTokenizer, chunked: bool) -> None:
    found = tokenize(tokenizer, "a (cat:1.5)! BREAK [photograph]", syntax="weighted", chunked=chunked)
    assert [chunk.ids[:5] for chunk in found.chunks] == [(BOS, 320, CAT, 256, EOS), (BOS, 8853, EOS, EOS, EOS)]
    assert [chunk.weights[:5] for chunk in found.chunks] == [(1, 1, 1.5, 1, 1), (1, DOWN, 1, 1, 1)]
    assert all(set(chunk.weights[5:]) == {1.0} for chunk in found.chunks)
    moved = tokenize(tokenizer, "cat " * 60 + "(, cat:2)" + "[cat]" * 20, syntax="weighted", chunked=True)
    assert words(moved) == [61, 21]
    assert moved.chunks[0].weights[60:63] == (1, 2, 1)
    assert moved.chunks[1].weights[:4] == (1, 2, DOWN, DOWN)


@pytest.mark.parametrize(
    ("prompt", "expected", "cut"),
    [
        ("a BREAK", [1], ""),
        ("BREAK a", [0, 1], ""),
        ("a BREAK BREAK b", [1, 0, 1], ""),
        ("(cat:1.2) " * 75 + " BREAK  dog", [75, 1], ""),
        ("cat " * 70 + "(dog " * 7 + "BREAK " + "a " * 78, [75, 75], "dog dog … a a a"),
        (r"cat " * 74 + r"cat \(a [dog])", [75], "(a dog)"),
        ("cat " * 75 + "(a) (dog)", [75], "a dog"),
        ("cat " * 75 + "( ) ", [75], ""),
    ],
)
def test_break_without_chunking(tokenizer: ClipTokenizer, prompt: str, expected: list[int], cut: str) -> None:
    found = tokenize(tokenizer, prompt, syntax="weighted")
    assert words(found) == expected
    assert found.cut_text.strip() == cut


def test_short_encoders() -> None:
    """The embedded model reads 24 tokens; the comma rule must end with fewer than its 20, too."""
    for length in (3, 4, 24):
        tokenizer = ClipTokenizer(clip_vocabulary(), length)
        found = tokenize(tokenizer, "a cat, " * 30, chunked=True)
        assert [i for c in found.chunks for i in c.ids if i not in (BOS, EOS)] == [320, CAT, COMMA] * 30
    with pytest.raises(BadDataError, match="2 tokens"):
        tokenize(ClipTokenizer(clip_vocabulary(), 2), "a cat")


@pytest.mark.parametrize("options", [{"chunked": True}, {"syntax": "weighted"}])
def test_endless_prompts(tokenizer: ClipTokenizer, options: dict[str, Any]) -> None:
    part = "cat " * 75 if "chunked" in options else "cat BREAK "
    assert len(tokenize(tokenizer, part * 128, **options).chunks) == 128
    with pytest.raises(UsageError, match="128 chunks"):
        tokenize(tokenizer, part * 128 + "cat", **options)


# ---- conditioning ----


class TinyEncoder:
    """CLIP of random weights; `calls` counts the rows of each call."""

    def __init__(self, width: int, *, pooled: bool = False, cleaned: bool = False) -> None:
        torch.manual_seed(width)
        config = TextEncoderConfig(
            hidden_size=width, intermediate_size=2 * width, layers=3, heads=2, final_norm=False, projection_dim=6
        )
        self.model = TextTransformer(config).eval()
        vocabulary = clip_vocabulary()
        pad = type(vocabulary)(vocabulary.ids, vocabulary.merges, "!") if cleaned else vocabulary
        self.tokenizer = ClipTokenizer(pad, 77, cleaned=cleaned)
        self.pooled = pooled
        self.calls: list[int] = []

    def encode(self, ids: Tensor, *, clip_skip: int = 1, words: Sequence[Any] = ()) -> tuple[Tensor, Tensor | None]:
        self.calls.append(len(ids))
        return self.model(ids, clip_skip=clip_skip, pooled=self.pooled)


@pytest.fixture(scope="module")
def tiny(one_thread: None) -> TinyEncoder:
    return TinyEncoder(16)


@pytest.fixture(scope="module")
def two(one_thread: None) -> PromptEncoder:
    return PromptEncoder([TinyEncoder(16), TinyEncoder(24, pooled=True, cleaned=True)])


def alone(encoder: TinyEncoder, ids: Sequence[int], clip_skip: int = 1) -> Tensor:
    with torch.inference_mode():
        return encoder.encode(torch.tensor([list(ids)]), clip_skip=clip_skip)[0]


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-6 * theirs.abs().max())


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_plain_prompt_is_the_encoders_output(tiny: TinyEncoder, clip_skip: int) -> None:
    (found,) = PromptEncoder([tiny]).encode(["a photo of a cat"], clip_skip=clip_skip)
    assert torch.equal(found.context, alone(tiny, read(tiny.tokenizer, "a photo of a cat").ids, clip_skip))
    assert found.context.shape == (1, 77, 16)
    assert found.pooled is None


def test_weight_one_changes_no_bit(tiny: TinyEncoder) -> None:
    encoder = PromptEncoder([tiny])
    plain, weighted = encoder.encode(["a cat"]) + encoder.encode(["a (cat:1)"], syntax="weighted")
    assert torch.equal(plain.context, weighted.context)


def original_emphasis(states: Tensor, multipliers: list[float]) -> Tensor:
    """A1111's "Original" emphasis of one chunk, in float32 as there: multiplied, then the mean restored."""
    multiplied = states * torch.tensor(multipliers).reshape(1, -1, 1).expand(states.shape)
    return multiplied * (states.mean() / multiplied.mean())


@pytest.mark.parametrize(
    ("prompt", "text", "weights"),
    [
        ("a (cat:1.5)", "a cat", [1, 1.5]),
        ("a ((cat)) [photo]", "a cat photo", [1, UP * UP, DOWN]),
        ("(a:0) cat", "a cat", [0, 1]),
        ("a (cat:-1)", "a cat", [1, -1]),
    ],
)
def test_emphasis_is_a1111s(tiny: TinyEncoder, prompt: str, text: str, weights: list[float]) -> None:
    (found,) = PromptEncoder([tiny]).encode([prompt], syntax="weighted")
    states = alone(tiny, read(tiny.tokenizer, text).ids)
    theirs = original_emphasis(states, [1, *weights, *[1.0] * (76 - len(weights))])
    # The mean of a chunk is a small difference of large sums: in float32 it has an error of its own.
    assert (found.context - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert close(found.context.mean(), states.mean())
    exact = original_emphasis(states.double(), [1, *weights, *[1.0] * (76 - len(weights))])
    assert close(found.context, exact.float())


def test_each_chunk_has_its_own_mean(tiny: TinyEncoder) -> None:
    encoder = PromptEncoder([tiny])
    (found,) = encoder.encode(["a (cat:1.5) BREAK dog BREAK [horse]"], syntax="weighted")
    parts = [encoder.encode([part], syntax="weighted")[0].context for part in ("a (cat:1.5)", "dog", "[horse]")]
    assert close(found.context, torch.cat(parts, dim=1))


def test_weights_that_leave_nothing_are_refused_and_the_dtype_stays() -> None:
    states = torch.randn(77, 8, generator=torch.Generator().manual_seed(0))
    assert close(emphasized(states, [1e300] * 77), states)  # all weigh the same: no weight at all
    assert emphasized(states.bfloat16(), [1.0, 1.2, *[1.0] * 75]).dtype == torch.bfloat16
    with pytest.raises(LdmError, match="nearer to 1"):
        emphasized(states, [0.0] * 77)


def test_equal_prompts_are_encoded_once(tiny: TinyEncoder) -> None:
    """Each by itself, so that its numbers do not depend on what is encoded beside it; and held for the next time."""
    tiny.calls.clear()
    encoder = PromptEncoder([tiny])
    found = encoder.encode(["a cat", "", "a cat", "a dog"])
    assert tiny.calls == [1, 1, 1]
    assert found[0] is found[2]
    again = encoder.encode(["a dog", "a cat"])
    assert tiny.calls == [1, 1, 1]
    assert torch.equal(again[0].context, found[3].context)


def test_what_is_held_is_bounded_in_size(tiny: TinyEncoder) -> None:
    size = PromptEncoder([tiny]).encode(["a"])[0].size
    encoder = PromptEncoder([tiny], max_bytes=3 * size)
    wanted = encoder.encode(["a", "b", "c", "d", "a"])
    assert torch.equal(wanted[0].context, wanted[4].context)
    encoder.encode(["d", "e"])  # "d" is held, "e" pushes out what was used longest ago
    tiny.calls.clear()
    encoder.encode(["c", "d", "e"])
    assert tiny.calls == []
    encoder.encode(["a"])
    assert tiny.calls == [1]


def test_what_is_held_is_held_for_its_settings(tiny: TinyEncoder) -> None:
    encoder = PromptEncoder([tiny])
    ways: list[dict[str, Any]] = [{}, {"syntax": "weighted"}, {"clip_skip": 2}]
    found = [encoder.encode(["(a:1.5) cat"], **way)[0].context for way in ways]
    assert len({context.numpy().tobytes() for context in found}) == len(ways)


def test_company_does_not_matter(two: PromptEncoder) -> None:
    prompts = ["a cat", "a (dog:1.4), " * 30, "", "x BREAK y"]
    together = two.encode(prompts, syntax="weighted", chunked=True)
    for prompt, found in zip(prompts, together, strict=True):
        (by_itself,) = two.encode([prompt], syntax="weighted", chunked=True)
        assert found.context.shape == by_itself.context.shape
        assert close(found.context, by_itself.context)
        assert found.pooled is not None
        assert by_itself.pooled is not None
        assert torch.equal(found.pooled, by_itself.pooled)


def test_two_encoders(two: PromptEncoder) -> None:
    first, second = two.encoders
    prompt = "caf&eacute; " * 70  # 75 tokens or fewer to the second, whose text is mended, and more to the first
    (found,) = two.encode([prompt], chunked=True)
    ours, theirs = (tokenize(e.tokenizer, prompt, chunked=True).chunks for e in (first, second))
    assert len(theirs) == 1 < len(ours)
    assert found.context.shape == (1, 77 * len(ours), 16 + 24)
    rows = [theirs[0].ids, *[read(second.tokenizer, "").ids] * (len(ours) - 1)]
    assert close(found.context[..., :16], torch.cat([alone(first, chunk.ids) for chunk in ours], dim=1))
    assert close(found.context[..., 16:], torch.cat([alone(second, row) for row in rows], dim=1))
    # The pooled projection: the last encoder's, of the first chunk, without weights.
    weighted, plain, broken = two.encode(["(cat:1.5)", "cat", "cat BREAK dog"], syntax="weighted")
    assert found.pooled is not None
    assert found.pooled.shape == (1, 6)
    assert weighted.pooled is not None
    assert all(one.pooled is not None and torch.equal(one.pooled, weighted.pooled) for one in (plain, broken))
    nothing = found.zeros
    assert nothing.pooled is not None
    assert (nothing.context.shape, nothing.pooled.shape) == (found.context.shape, found.pooled.shape)
    assert not nothing.context.any()
    assert not nothing.pooled.any()
