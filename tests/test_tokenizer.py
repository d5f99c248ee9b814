"""Token ids are those of transformers' CLIPTokenizer, which diffusers uses, for every text there is; where text is
cleaned, those of open_clip's SimpleTokenizer."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmcli.conditioning.chunks import tokenize
from ldmcli.conditioning.tokenizer import ClipTokenizer, clip_vocabulary, vocabulary_from_folder
from ldmcli.errors import BadDataError, MissingInputError

# What splitting, normalising or special tokens could get wrong.
PIECES = [
    *("<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>", "<|endoftext|", "<|", "|>", "</w>", "<start_of_text>"),
    *("'s", "'S", "'t", "'re", "'ve", "'m", "'ll", "'d", "’s", "''", "it's", "can't"),
    *(" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u200b", "\u3000", "\ufeff", "\x85", "\x1c", "\x00"),
    *("🎉", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "❤️", "1️⃣", "e\u0301", "é", "É", "ﬁ", "ß", "ẞ", "İ", "ı", "ǅ", "Σ", "ς"),
    *("猫", "한", "ㄱ", "अ", "ا", "ﷺ", "½", "²", "Ⅷ", "８", "_", "-", "...", "!?", "(a:1.2)", "[b]", "\\", "%", "#1"),
    *("cat", "Cat", "CAT", "photograph", "123", "3d", "a", "1984's", "xx" * 20),
]
TEXTS = st.one_of(
    st.text(),
    st.lists(st.sampled_from(PIECES)).map("".join),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=12).map(" ".join),
    st.lists(st.sampled_from(PIECES), min_size=60, max_size=150).map(" ".join),
)
SENTENCES = [
    "", "a photo of a cat", "a photograph of an astronaut riding a horse", "It's 1984,   O'Brien's CAFÉ!", "猫 🎉",
    "NAÏVE crème brûlée", "cafe\u0301", "a 👩‍👩‍👧‍👦 family, ❤️", "東京の夜景", "schÃ¶ne GrÃ¼ÃŸe", "doesnâ€™t",
    "“curly” — it’s", "Tom &amp; Jerry", "&amp;lt;b&amp;gt; &eacute;", "3.14 and 1,000,000", "they'll we've I'm you'd",
    "wow!!! so... good?!", "  two  spaces\tand\na line ", "ﬁne Ⅷ ½", "straße ΣΑΣ",
    "<end_of_text> a <|endoftext|> b", "\ufeffbom\u200b",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer(clip_vocabulary(), 77)


@pytest.fixture(scope="module")
def transformers_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    vocabulary = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary.ids, merges=vocabulary.merges, model_max_length=77)


def their_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """What diffusers' pipelines ask for."""
    length = tokenizer.model_max_length
    return tuple(tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids)


class OneChunk(NamedTuple):
    """What an encoder that reads one chunk gets of a prompt, and what it does not."""

    ids: tuple[int, ...]
    cut_text: str


def read(tokenizer: ClipTokenizer, prompt: str) -> OneChunk:
    found = tokenize(tokenizer, prompt)
    (chunk,) = found.chunks
    return OneChunk(chunk.ids, found.cut_text)


@pytest.fixture(scope="module")
def openclip_tokenizer() -> ClipTokenizer:
    return ClipTokenizer(dataclasses.replace(clip_vocabulary(), pad_token="!"), 77, cleaned=True)


@pytest.fixture(scope="module")
def openai_tokenizer() -> Any:
    """OpenAI's own tokenizer, as open_clip carries it: written by others, in Python."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


# Characters of Unicode 14, which Python 3.11 knows: of newer letters the libraries' tables differ.
ASSIGNED = st.text(st.characters(exclude_categories=["Cs", "Cn"]))
OPENCLIP_PIECES = [
    *("<start_of_text>", "<end_of_text>", "<END_OF_TEXT>", ":<end_of_text>", "<end_of_text", "'ſ", "<ſtart_of_text>"),
    *("K", "&amp;", "&amp;amp;lt;", "a\u0345", "\u0345", "\u212a", "&lt;end_of_text&gt;", "&nbsp;", "&#x27;", "&#0;"),
    *("&", "Ã©", "â€œ", "â€", "ÂŁ", "\x9d"),
]
OPENCLIP_TEXTS = st.one_of(
    ASSIGNED,
    st.lists(st.one_of(st.sampled_from([*PIECES, *OPENCLIP_PIECES]), ASSIGNED), max_size=12).map("".join),
    st.lists(st.sampled_from([*PIECES, *OPENCLIP_PIECES]), min_size=30, max_size=100).map(" ".join),
)


@settings(max_examples=200, deadline=None)
@given(text=OPENCLIP_TEXTS)
def test_cleaned_text_is_tokenized_as_by_open_clip(
    openclip_tokenizer: ClipTokenizer, openai_tokenizer: Any, text: str
) -> None:
    assert list(read(openclip_tokenizer, text).ids) == openai_tokenizer(text)[0].tolist()
    tokens = openclip_tokenizer.tokens(text)
    assert tokens.ids == openai_tokenizer.encode(text)
    assert tokens.starts == sorted(tokens.starts)


def test_each_piece_cleaned(openclip_tokenizer: ClipTokenizer, openai_tokenizer: Any) -> None:
    for piece in (*PIECES, *OPENCLIP_PIECES, *SENTENCES):
        for text in (piece, f"a{piece}b", f" {piece} ", piece * 3, f"{piece} " * 100):
            assert list(read(openclip_tokenizer, text).ids) == openai_tokenizer(text)[0].tolist(), text


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("cat " * 75, ""),
        ("Cat  " * 77, "cat cat"),
        ("cat &amp;\n" * 40, "& cat & cat &"),
        ("<end_of_text>" * 76, "<end_of_text>"),
        ("cat " * 74 + "<start_of_text>dog", "dog"),
    ],
)
def test_cut_text_is_the_cleaned_texts(openclip_tokenizer: ClipTokenizer, prompt: str, cut: str) -> None:
    assert read(openclip_tokenizer, prompt).cut_text == cut


def test_without_ftfy(openclip_tokenizer: ClipTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(MissingInputError, match="pip install ftfy"):
        read(openclip_tokenizer, "a cat")


def test_each_piece(tokenizer: ClipTokenizer, transformers_tokenizer: Any) -> None:
    for piece in (*PIECES, *SENTENCES):
        for text in (piece, f"a{piece}b", f" {piece} ", piece * 3, f"{piece} " * 100):
            assert read(tokenizer, text).ids == their_ids(transformers_tokenizer, text), text


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("cat " * 75, ""),
        ("cat " * 76, "cat "),
        ("Cat  " * 80, "Cat  " * 5),
        ("e\u0301 " * 77, "e\u0301 " * 2),  # NFC makes one letter of two, the offsets stay those of the prompt
        ("\u00a0\t猫 " * 26, "猫 "),  # three tokens each
        ("", ""),
    ],
)
def test_cut_text(tokenizer: ClipTokenizer, prompt: str, cut: str) -> None:
    found = read(tokenizer, prompt)
    assert found.cut_text == cut
    assert found.ids[0] == 49406
    assert found.ids[-1] == 49407
    assert read(tokenizer, prompt[: len(prompt) - len(cut)]).ids == found.ids


@pytest.mark.parametrize("length", [3, 24, 77])
def test_other_lengths(transformers_tokenizer: Any, length: int) -> None:
    ours = ClipTokenizer(clip_vocabulary(), length)
    for text in ("", "cat", "a photo of a cat " * 20):
        theirs = transformers_tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids
        assert list(read(ours, text).ids) == theirs


def test_embedded_model(embedded_folder: Path) -> None:
    from transformers import CLIPTokenizer

    from ldmcli.checkpoints.source import open_model

    ours = open_model(embedded_folder).tokenizers[0]
    theirs = CLIPTokenizer.from_pretrained(embedded_folder / "tokenizer", local_files_only=True)
    assert ours.max_length == theirs.model_max_length
    for text in (*SENTENCES, *PIECES, "a red apple on a blue background " * 9):
        if "\x00" not in text:
            assert read(ours, text).ids == their_ids(theirs, text)


# ---- folders ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer/ folder as Stable Diffusion 1's: vocab.json and merges.txt."""
    vocabulary = clip_vocabulary()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary.ids), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in vocabulary.merges), ""]
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    return tmp_path


def test_old_and_new_folders_hold_clips_vocabulary(folder: Path, model_folder: Path) -> None:
    assert vocabulary_from_folder(folder) == clip_vocabulary()
    assert not (model_folder / "tokenizer" / "vocab.json").exists()  # transformers 5 writes tokenizer.json
    assert vocabulary_from_folder(model_folder / "tokenizer") == clip_vocabulary()


def test_incomplete_folder(folder: Path) -> None:
    (folder / "merges.txt").unlink()
    with pytest.raises(MissingInputError, match=r"vocab\.json with merges\.txt"):
        vocabulary_from_folder(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("vocab.json", text) for text in (b"{", b"[1, 2]", b'{"a": "b"}', b"\xff\xfe\x00", b"[" * 100_000)),
        *(("merges.txt", text) for text in (b"a b c\n", b"\xff\xff")),
        *(("tokenizer.json", text) for text in (b"{}", b'{"model": null}', b'{"model": []}')),
        *(
            ("tokenizer.json", b'{"model": {"vocab": %b, "merges": %b}}' % (vocab, merges))
            for vocab, merges in (
                (b"null", b"[]"),
                (b'{"a": 0}', b'[["a"]]'),
                (b'{"a": 0}', b"null"),
                (b'{"a": 0}', b"[7]"),
            )
        ),
    ],
)
def test_damaged_folder(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(BadDataError):
        vocabulary_from_folder(folder)


@pytest.mark.parametrize("token", ["<|startoftext|>", "<|endoftext|>"])
def test_vocabulary_without_marks(folder: Path, token: str) -> None:
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    del ids[token]
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    with pytest.raises(BadDataError, match="has no"):
        ClipTokenizer(vocabulary_from_folder(folder), 77)


def test_merges_of_unknown_tokens(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\nnowhere toBeFound\n", encoding="utf-8")
    tokenizer = ClipTokenizer(vocabulary_from_folder(folder), 77)
    with pytest.raises(BadDataError):
        read(tokenizer, "a cat")


# ---- added words ----


def word(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": True} | flags


NUMBERED = {
    "49406": word("<|startoftext|>", special=True),
    "49407": word("<|endoftext|>", normalized=False, special=True),
    "49408": word("<Glow>", special=False),
    "49409": word("Foo", lstrip=True, rstrip=True, single_word=True, special=False, normalized=False),
    "49411": word("<late>", special=True),
}
SMALL_FILES: dict[str, dict[str, Any]] = {
    "added": {"added_tokens.json": {"<glow-toy>": 49408, "<B>": 49409}},
    "added, numbers with a gap": {"added_tokens.json": {"<B>": 49500, "<glow-toy>": 49410, "cat</w>": 5}},
    "special map": {
        "special_tokens_map.json": {
            "bos_token": word("<|startoftext|>"),
            "unk_token": "<|endoftext|>",
            "additional_special_tokens": ["<Glow>", "Foo"],
        },
        "added_tokens.json": {"Foo": 49408},
    },
    "numbered": {
        "tokenizer_config.json": {"added_tokens_decoder": NUMBERED, "additional_special_tokens": ["<late>", "<more>"]},
        "special_tokens_map.json": {"additional_special_tokens": ["<B>"]},
    },
    "padded as Stable Diffusion 2": {"special_tokens_map.json": {"pad_token": {"content": "!", "lstrip": False}}},
    "a padding of its own": {"tokenizer_config.json": {"pad_token": "<pad>"}},
    "named": {"tokenizer_config.json": {"image_token": "<more>", "extra_special_tokens": {"b_token": "<B>"}}},
}
ADDED_TEXTS = (
    "a photo of <glow-toy>", "a <GLOW-TOY>, <b> <B>x", "x<glow-toy>y", "<Glow> <glow> Foo foo Foofoo  Foo !",
    "<late><more> <B>", "wow <pad> cat</w> cat", "a cat!", "!", "wow!!! !a", "<|STARTOFTEXT|> <|startoftext|>", "",
)  # fmt: skip


@pytest.mark.parametrize("saved_again", [False, True], ids=["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("files", SMALL_FILES.values(), ids=SMALL_FILES)
def test_added_words_are_tokens_as_transformers_has_them(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, files: dict[str, Any], saved_again: bool
) -> None:
    from transformers import CLIPTokenizer

    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    theirs = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    if saved_again:
        theirs.add_tokens(["<glow-toy>", "Zed"])
        folder = tmp_path_factory.mktemp("saved")
        theirs.save_pretrained(folder)
        theirs = CLIPTokenizer.from_pretrained(folder)
    ours = ClipTokenizer(vocabulary_from_folder(folder), 77)
    for text in ADDED_TEXTS:
        assert read(ours, text).ids == their_ids(theirs, text), text


def test_what_no_row_of_the_text_encoder_stands_for_is_refused_when_it_is_used(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<glow-toy>": 49408}')
    ours = ClipTokenizer(vocabulary_from_folder(folder), 77, rows=49408)
    assert ours.tokens("a cat").ids == [320, 2368]
    with pytest.raises(
        BadDataError, match=r"gives token '<glow-toy>' the number 49408, and the text encoder knows 0 to"
    ):
        ours.tokens("a <glow-toy>")


@pytest.mark.parametrize("added", [7, {"content": 7}, {"content": "x", "lstrip": "yes"}, {}])
def test_added_words_that_are_none_are_refused(folder: Path, added: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"49408": added}}))
    with pytest.raises(BadDataError, match="adds what is no token"):
        vocabulary_from_folder(folder)
