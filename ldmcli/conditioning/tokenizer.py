"""CLIP's byte-pair tokenizer, built from a model folder or from CLIP's own vocabulary.

The rules (NFC, spaces folded, lower case, the splitting expression) are those of transformers' CLIPTokenizer, which
diffusers uses; the `tokenizers` library is used directly because transformers takes seconds to import. OpenCLIP's rules
differ: it mends text first (ftfy, HTML entities) and writes the begin and end marks otherwise.
"""

import dataclasses
import gzip
import html
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ldmcli.disk.opening import read_json, read_text
from ldmcli.errors import BadDataError, MissingInputError, printable

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_ENDINGS, _WORDS = "'s|'t|'re|'ve|'m|'ll|'d", r"[\p{L}]+|[\p{N}]"
_SPLIT = rf"<\|startoftext\|>|<\|endoftext\|>|{_ENDINGS}|{_WORDS}|[^\s\p{{L}}\p{{N}}]+"
# OpenCLIP's marks are matched as words, not cut out of the text beforehand, and letter case is ignored: so a long s
# (U+017F), which stays so in lower case, is an ending as 's is, and the accent U+0345, whose capital is a letter, is
# left out, since to open_clip's `regex` it is neither a letter nor something else.
_OPENCLIP_BOS, _OPENCLIP_EOS = "<start_of_text>", "<end_of_text>"
_OPENCLIP_SPLIT = rf"(?i:{_OPENCLIP_BOS}|{_OPENCLIP_EOS}|{_ENDINGS})|{_WORDS}|[^\s\p{{L}}\p{{N}}\x{{0345}}]+"
_MAX_BYTES = 16 << 20  # of one file; CLIP's largest has 3.6 MB
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# The tokens that have a name in transformers, in its order, with CLIP's own; the last fills up short prompts.
_NAMED: dict[str, str] = {"bos_token": _BOS, "eos_token": _EOS, "unk_token": _EOS, "pad_token": _EOS}
_CLIP_MERGES = 49152 - 256 - 2  # CLIP uses the first so many lines of its merges file


@dataclasses.dataclass(frozen=True)
class AddedWord:
    """A token that is found in the text as it stands, before text is split into words; in the words of `tokenizers`."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made of: token ids, merges in order of rank, the token that fills up short prompts, and added
    words, in order: those that `ids` lacks get the ids after its last."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    pad_token: str = _EOS
    added: tuple[AddedWord, ...] = (AddedWord(_BOS), AddedWord(_EOS))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of a text, as many as there are, and where each starts in `text` (which `cleaned` may have changed)."""

    text: str
    ids: list[int]
    starts: list[int]


class ClipTokenizer:
    """Prompts to token ids. `max_length` counts the begin and end marks; `cleaned` mends and splits text as OpenCLIP
    does instead of as transformers does. `rows` is how many tokens the text encoder knows."""

    marks = (_BOS, _EOS)

    def __init__(
        self, vocabulary: Vocabulary, max_length: int, *, cleaned: bool = False, rows: int | None = None
    ) -> None:
        self._vocabulary = vocabulary
        self._rows = rows
        self.max_length = max_length
        self.cleaned = cleaned
        self.bos_id, self.eos_id = (self._checked(token, vocabulary.ids.get(token)) for token in self.marks)
        pad = vocabulary.ids.get(vocabulary.pad_token)
        if pad is None:  # the backend, which takes time to make, knows the ids of added words
            pad = self._backend.token_to_id(vocabulary.pad_token)
        self.pad_id = self._checked(vocabulary.pad_token, pad)
        self.comma_id = vocabulary.ids.get(",</w>")

    def framed(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Up to `max_length - 2` ids between begin and end marks, padded to `max_length`."""
        row = (self.bos_id, *ids, self.eos_id)
        return row + (self.pad_id,) * (self.max_length - len(row))

    def tokens(self, text: str) -> Tokens:
        """The text's tokens, however many, without marks."""
        ids: list[int] = []
        starts: list[int] = []
        text = _cleaned(text) if self.cleaned else text
        for start, end, mark in self._runs(text):
            encoding = self._backend.encode(text[start:end], add_special_tokens=False)
            ids += [*encoding.ids, *mark]
            starts += [start + offset for offset, _ in encoding.offsets] + [end] * len(mark)
        if self._rows is not None and max(ids, default=0) >= self._rows:
            self._checked(self._backend.id_to_token(max(ids)), max(ids))
        return Tokens(text, ids, starts)

    def _checked(self, token: str, number: int | None) -> int:
        """The token's number, which must be a row of the text encoder."""
        if number is None:
            raise BadDataError(f"the tokenizer's vocabulary has no {printable(token)} token.")
        if self._rows is not None and number >= self._rows:
            raise BadDataError(
                f"the tokenizer gives token {printable(repr(token))} the number {number}, and the text encoder knows 0 "
                f"to {self._rows - 1}; they are not of one model."
            )
        return number

    def _runs(self, text: str) -> Iterator[tuple[int, int, list[int]]]:
        """Where the stretches between OpenCLIP's marks start and end, and the id of the mark that follows, if any.

        A mark counts where the splitting expression makes it a word, so `:<end_of_text>` holds none.
        """
        start = 0
        if self.cleaned and (_OPENCLIP_BOS in text or _OPENCLIP_EOS in text):
            marks = {_OPENCLIP_BOS: self.bos_id, _OPENCLIP_EOS: self.eos_id}
            for word, (at, after) in self._backend.pre_tokenizer.pre_tokenize_str(text):
                if word in marks:
                    yield start, at, [marks[word]]
                    start = after
        yield start, len(text), []

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

        try:
            model = models.BPE(
                vocab=self._vocabulary.ids,
                merges=self._vocabulary.merges,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                unk_token=_EOS,
            )
        except Exception as error:  # tokenizers raises nothing narrower
            raise BadDataError(f"the tokenizer's vocabulary and merges do not fit: {printable(str(error))}.") from None
        backend = Tokenizer(model)
        if not self.cleaned:
            backend.normalizer = normalizers.Sequence(
                [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
            )
            backend.add_tokens([AddedToken(**dataclasses.asdict(word)) for word in self._vocabulary.added])
        split = _OPENCLIP_SPLIT if self.cleaned else _SPLIT
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="removed", invert=True),
                # Its own expression, GPT-2's, would split OpenCLIP's marks again.
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.cleaned),
            ]
        )
        return backend


def _cleaned(text: str) -> str:
    """OpenCLIP's cleaning (its tokenizer's "lower"): broken text mended, HTML entities read, spaces folded."""
    try:
        import ftfy
    except ImportError:
        raise MissingInputError("this model's prompts need ftfy, which is not installed: pip install ftfy.") from None
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def vocabulary_from_folder(folder: Path) -> Vocabulary:
    """The vocabulary of a diffusers `tokenizer/` folder: tokenizer.json, or vocab.json with merges.txt; and the words
    that these and the small files beside them add, as transformers' CLIPTokenizer reads them."""
    whole = _json_beside(folder, "tokenizer.json")
    if (folder / "tokenizer.json").is_file():
        model = whole.get("model")
        ids, found = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
        if not isinstance(found, list):
            raise BadDataError(f"{printable(str(folder / 'tokenizer.json'))} holds no list of merges.")
        merges = _pairs(found, folder)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        ids = read_json(folder / "vocab.json", _MAX_BYTES)
        lines = read_text(folder / "merges.txt", _MAX_BYTES).splitlines()
        merges = _pairs([line for line in lines if line and not line.startswith("#version")], folder)
    else:
        raise MissingInputError(
            f"{printable(str(folder))} holds neither vocab.json with merges.txt nor tokenizer.json; the model folder "
            "is incomplete."
        )
    if not isinstance(ids, dict) or not all(isinstance(i, int) for i in ids.values()):
        raise BadDataError(f"the vocabulary in {printable(str(folder))} is not a table of token ids.")
    settings = _json_beside(folder, "tokenizer_config.json")
    if "additional_special_tokens" in settings:  # its name before transformers 5
        settings.setdefault("extra_special_tokens", settings.pop("additional_special_tokens"))
    if settings.get("added_tokens_decoder") is None:  # which stands for the older files
        settings |= _json_beside(folder, "special_tokens_map.json")
    named = [_word(folder, settings.get(name) or default, special=True) for name, default in _NAMED.items()]
    return Vocabulary(ids, merges, named[-1].content, _added_words(folder, settings, whole, named))


def _added_words(
    folder: Path, settings: Mapping[str, Any], whole: Mapping[str, Any], named: Sequence[AddedWord]
) -> tuple[AddedWord, ...]:
    """The added words in the order in which they get ids: those with numbers, those of a name, and those without."""
    others = (value for key, value in settings.items() if key.endswith("_token") and key not in _NAMED)
    is_word = (value for value in others if isinstance(value, str) or (isinstance(value, dict) and "content" in value))
    named = [*named, *(_word(folder, value, special=True) for value in is_word)]
    extra = _words(folder, settings.get("extra_special_tokens"))
    special = {word.content for word in named}
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        numbered: list[tuple[Any, Any]] = list(decoder.items())
    else:
        kept = special | {word.content for word in extra}
        listed = _json_beside(folder, "added_tokens.json").items()
        numbered = [(number, {"content": content, "special": content in kept}) for content, number in listed]
        numbered += [
            (word.get("id") if isinstance(word, dict) else None, word) for word in whole.get("added_tokens") or []
        ]
        extra = extra or _words(folder, settings.get("additional_special_tokens"))
    try:
        words = {int(number): _word(folder, word) for number, word in numbered}
    except (TypeError, ValueError):
        raise _unreadable(folder, numbered) from None
    found: dict[str, AddedWord] = {}
    for word in (*(words[number] for number in sorted(words)), *named, *extra):
        found.setdefault(word.content, dataclasses.replace(word, special=word.special or word.content in special))
    return tuple(found.values())


def _words(folder: Path, values: Any) -> list[AddedWord]:
    """The special words in a list, or in a table of named ones."""
    values = list(values.values()) if isinstance(values, dict) else values or []
    if not isinstance(values, list):
        raise _unreadable(folder, values)
    return [_word(folder, value, special=True) for value in values]


def _word(folder: Path, value: Any, *, special: bool = False) -> AddedWord:
    """The word that a text or a table stands for; a table of a `special` one need not say that it is."""
    if isinstance(value, str):
        return AddedWord(value)
    flags = {name: value[name] for name in _FLAGS if name in value} if isinstance(value, dict) else {}
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise _unreadable(folder, value)
    special = special or flags.get("special", False)
    return AddedWord(content, **({"normalized": not special} | flags | {"special": special}))


def _unreadable(folder: Path, value: object) -> BadDataError:
    return BadDataError(f"{printable(str(folder))} adds what is no token: {printable(repr(value)[:100])}.")


def _json_beside(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name, _MAX_BYTES) if (folder / name).is_file() else {}


def clip_vocabulary() -> Vocabulary:
    """CLIP's own vocabulary, which open_clip's wheel carries; read without importing open_clip."""
    spec = importlib.util.find_spec("open_clip")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [path for path in (Path(f) / "bpe_simple_vocab_16e6.txt.gz" for f in folders) if path.is_file()]
    if not files:
        raise MissingInputError(
            "CLIP's vocabulary is not installed; a single-file checkpoint needs it: pip install open_clip_torch."
        )
    lines = gzip.decompress(files[0].read_bytes()).decode("utf-8").split("\n")
    merges = _pairs(lines[1 : _CLIP_MERGES + 1], files[0])
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *("".join(m) for m in merges), _BOS, _EOS]
    return Vocabulary({token: i for i, token in enumerate(tokens)}, merges)


def _byte_alphabet() -> list[str]:
    """One printable character for each byte, in CLIP's order: printable Latin-1 first, the rest from U+0100 on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, kept), *map(chr, range(256, 512 - len(kept)))]


def _pairs(merges: Sequence[Any], source: Path) -> list[tuple[str, str]]:
    """The merges, each a line or a list of two tokens. CLIP has 49,000 of them, read at every start: hence one pass
    that makes pairs and one that looks at them, without a call for each."""
    pairs: list[Any] = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else ()
        for merge in merges
    ]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2 or not (isinstance(pair[0], str) and isinstance(pair[1], str)):
            shown = printable(str(merge))
            raise BadDataError(f"{printable(str(source))} holds a merge that is not two tokens: {shown}.")
    return pairs
