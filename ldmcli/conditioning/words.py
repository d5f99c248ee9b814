"""Words of prompts that stand for vectors: textual-inversion embeddings, put in where a text's tokens spell them.

As in AUTOMATIC1111's web UI, a word is found by its tokens, so letter case makes no difference and it may stand beside
punctuation; of several that begin at one token the longest counts. Not as there: the end of a longer word is no word;
and one that begins or ends with a mark is one wherever it stands, as diffusers' `<token>` is, although CLIP would read
the marks of `<cat>,` as one.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ldmcli.conditioning.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from torch import Tensor


class Vectors(Protocol):
    """What a word stands for."""

    @property
    def count(self) -> int:
        """How many vectors there are, which is how many tokens of a prompt they take the place of."""

    def of_part(self, part: str) -> "Tensor":
        """Those for a text encoder, (count, hidden_size)."""


class Word:
    """A word as it is typed. Its vectors are asked for when a prompt has the word; that raises LdmError where they are
    not there or not for this model."""

    def __init__(self, text: str, find: Callable[[], Vectors]) -> None:
        self.text = text
        self._find = find

    @property
    def exists(self) -> bool:
        """Whether there is anything it stands for."""
        return True

    @functools.cached_property
    def vectors(self) -> Vectors:
        """What it stands for."""
        return self._find()


Words = Mapping[str, Word]  # by what `folded` makes of them
NO_WORDS: Words = {}


class Unit(NamedTuple):
    """What chunks are filled with: a token, or a word whose vectors stay together; `start` is its place in the text."""

    token: int
    start: int
    word: Word | None = None

    @property
    def size(self) -> int:
        """How many tokens' room it takes."""
        return self.word.vectors.count if self.word else 1


def folded(text: str) -> str:
    """The text without letter case, blanks, and the backslashes of prompts."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return "".join(plain.casefold().replace("\\", "").split())


def occurring(words: Words, text: str) -> Words:
    """The words that a text may have; few, so that only those are looked for among its tokens."""
    if not words:
        return words
    whole = folded(text)
    return {key: word for key, word in words.items() if key in whole and word.exists}


def units(tokenizer: ClipTokenizer, text: str, words: Words) -> tuple[str, list[Unit]]:
    """A text as the tokenizer reads it, and its tokens with these words put in; every unit starts in that text."""
    if not words:
        tokens = tokenizer.tokens(text)
        return tokens.text, [Unit(*pair) for pair in zip(tokens.ids, tokens.starts, strict=True)]
    tokens = tokenizer.tokens(_set_apart(text, words))
    spelled = [(tokenizer.tokens(word.text).ids, word) for word in words.values()]
    spelled = sorted((pair for pair in spelled if pair[0]), key=lambda pair: -len(pair[0]))
    found: list[Unit] = []
    at = 0
    while at < len(tokens.ids):
        start = tokens.starts[at]
        inside = tokens.text[max(0, start - 1) : start + 1]  # of a longer word, where both are letters
        ids, word = _spelled_at(tokens.ids, at, [] if len(inside) == 2 and inside.isalpha() else spelled)
        found.append(Unit(tokens.ids[at], start, word))
        at += len(ids)
    return tokens.text, found


def _spelled_at(
    ids: Sequence[int], at: int, spelled: Sequence[tuple[list[int], Word]]
) -> tuple[Sequence[int], Word | None]:
    """The longest word whose tokens begin at this place, else the token there."""
    token = ids[at : at + 1]
    return next(((own, word) for own, word in spelled if ids[at : at + len(own)] == own), (token, None))


def _set_apart(text: str, words: Words) -> str:
    """The text with blanks around words that begin or end with a mark."""
    marked = [word.text for word in words.values() if not (word.text[:1].isalnum() and word.text[-1:].isalnum())]
    if not marked:
        return text
    longest_first = sorted(map(re.escape, marked), key=len, reverse=True)
    return re.sub("|".join(longest_first), r" \g<0> ", text, flags=re.IGNORECASE)
