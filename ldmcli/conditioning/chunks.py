"""Prompts to chunks: the rows of token ids, with a weight for each token, that a text encoder reads one by one."""

import dataclasses
import itertools
from collections.abc import Iterable

from ldmcli.conditioning.syntax import Piece, parse
from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.errors import BadDataError, UsageError

SYNTAXES = ("plain", "weighted")
_BACKTRACK = 20  # A1111's comma_padding_backtrack
_MAX_CHUNKS = 128  # 9600 tokens; the U-Net's attention grows with every one


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a text encoder reads at once: token ids, begin and end marks and padding included, and as many weights."""

    ids: tuple[int, ...]  # max_length of them
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt's chunks, at least one, and what did not fit into them ("" if all did)."""

    chunks: tuple[Chunk, ...]
    cut_text: str


def tokenize(tokenizer: ClipTokenizer, prompt: str, *, syntax: str = "plain", chunked: bool = False) -> TokenizedPrompt:
    """The prompt for an encoder that reads `tokenizer.max_length` tokens, two of them marks.

    syntax: "plain", the prompt as typed, or "weighted" (`prompt_syntax`), where each BREAK starts a new chunk.
    chunked: text that is too long goes on in further chunks as in AUTOMATIC1111's web UI; else it is cut.

    Raises UsageError for a prompt of too many chunks and as `parse` does.
    """
    if syntax not in SYNTAXES:
        raise ValueError(f"no such prompt syntax: {syntax}")
    if tokenizer.max_length < 3:
        raise BadDataError(f"a text encoder of {tokenizer.max_length} tokens reads no prompt.")
    pieces = parse(prompt) if syntax == "weighted" else [Piece(prompt, 1.0)]
    chunks = _Chunks(tokenizer)
    cut_texts = []
    for i, section in enumerate(_sections(pieces)):
        if i:
            chunks.end()
        if chunked:
            chunks.fill(section)
        else:
            cut_texts.append(chunks.fill_one(section))
    return TokenizedPrompt(chunks.finish(), " … ".join(filter(None, cut_texts)))


def _sections(pieces: Iterable[Piece]) -> Iterable[list[Piece]]:
    """The pieces between BREAKs."""
    section: list[Piece] = []
    for piece in pieces:
        if piece.after_break:
            yield section
            section = []
        section.append(piece)
    yield section


class _Chunks:
    """Chunks done, and the tokens of the one being filled."""

    def __init__(self, tokenizer: ClipTokenizer) -> None:
        self._tokenizer = tokenizer
        self._room = tokenizer.max_length - 2
        self._done: list[Chunk] = []
        self._tokens: list[tuple[int, float]] = []
        self._after_comma: int | None = None  # where the text after this chunk's last comma starts

    def fill(self, section: Iterable[Piece]) -> None:
        """Add all tokens. A full chunk ends after its last comma if that is among its last 20 tokens."""
        for piece in section:
            for token in self._tokenizer.tokens(piece.text).ids:
                is_comma = token == self._tokenizer.comma_id
                if len(self._tokens) == self._room:
                    near = self._after_comma is not None and self._room - self._after_comma < _BACKTRACK
                    # A comma does not send back what precedes it: it opens the next chunk.
                    self.end(self._after_comma if near and not is_comma else None)
                elif is_comma:
                    self._after_comma = len(self._tokens) + 1
                self._tokens.append((token, piece.weight))

    def fill_one(self, section: Iterable[Piece]) -> str:
        """Add the tokens that fit into this chunk and return the text that does not."""
        left_over, is_cut = [], False
        for piece in section:
            if is_cut:
                left_over.append(piece.text)
                continue
            tokens = self._tokenizer.tokens(piece.text)
            free = self._room - len(self._tokens)
            self._tokens += zip(tokens.ids[:free], itertools.repeat(piece.weight))
            left_over.append(tokens.text_from(free) if free else tokens.text)
            is_cut = len(tokens.ids) > free
        return "".join(left_over) if is_cut else ""  # what is left over may be spaces alone

    def end(self, at: int | None = None) -> None:
        """Finish the chunk and start another, with the tokens from `at` on in it."""
        if len(self._done) == _MAX_CHUNKS:
            raise UsageError(f"a prompt is longer than {_MAX_CHUNKS} chunks of {self._room} tokens.")
        tokens, rest = (self._tokens, []) if at is None else (self._tokens[:at], self._tokens[at:])
        ids = self._tokenizer.framed([token for token, _ in tokens])
        weights = [1.0, *(weight for _, weight in tokens)]
        weights += [1.0] * (self._tokenizer.max_length - len(weights))
        self._done.append(Chunk(ids, tuple(weights)))
        self._tokens, self._after_comma = rest, None

    def finish(self) -> tuple[Chunk, ...]:
        """All chunks; a BREAK at the very end adds none."""
        if self._tokens or not self._done:
            self.end()
        return tuple(self._done)
