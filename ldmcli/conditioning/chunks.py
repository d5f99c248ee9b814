"""Prompts to chunks: the rows of token ids, with a weight for each token, that a text encoder reads one by one."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from ldmcli.conditioning.syntax import Piece, parse
from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.errors import BadDataError, UsageError

_BACKTRACK = 20  # A1111's comma_padding_backtrack
_MAX_CHUNKS = 128  # 9600 tokens; the U-Net's attention grows with every one

_Row = list[tuple[int, float]]  # tokens without begin and end marks, with their weights


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
    room = tokenizer.max_length - 2
    if room < 1:
        raise BadDataError(f"a text encoder of {tokenizer.max_length} tokens reads no prompt.")
    sections = _sections(parse(prompt) if syntax == "weighted" else [Piece(prompt, 1.0)])
    read = _all_rows if chunked else _first_row
    found = itertools.chain.from_iterable(read(tokenizer, section, room) for section in sections)
    rows = list(itertools.islice(found, _MAX_CHUNKS + 2))
    if len(rows) > 1 and not rows[-1][0]:
        rows.pop()  # a BREAK at the very end adds no chunk
    if len(rows) > _MAX_CHUNKS:
        raise UsageError(f"a prompt is longer than {_MAX_CHUNKS} chunks of {room} tokens.")
    chunks = tuple(_framed(tokenizer, row) for row, _ in rows)
    return TokenizedPrompt(chunks, " … ".join(cut for _, cut in rows if cut))


def _sections(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces between BREAKs."""
    section: list[Piece] = []
    for piece in pieces:
        if piece.after_break:
            yield section
            section = []
        section.append(piece)
    yield section


def _all_rows(tokenizer: ClipTokenizer, section: Sequence[Piece], room: int) -> Iterator[tuple[_Row, str]]:
    """All tokens. A full chunk ends after its last comma if that is among its last 20 tokens; but a comma that opens
    the next chunk does not take along what precedes it."""
    tokens = [(token, piece.weight) for piece in section for token in tokenizer.tokens(piece.text).ids]
    start = 0
    while start + room < len(tokens):
        end = start + room
        if tokens[end][0] != tokenizer.comma_id:
            near = range(end, max(start, end - _BACKTRACK), -1)
            end = next((at for at in near if tokens[at - 1][0] == tokenizer.comma_id), end)
        yield tokens[start:end], ""
        start = end
    yield tokens[start:], ""


def _first_row(tokenizer: ClipTokenizer, section: Sequence[Piece], room: int) -> Iterator[tuple[_Row, str]]:
    """The tokens that fit into one chunk, and the text that does not."""
    row: _Row = []
    left_over, is_cut = [], False
    for piece in section:
        if is_cut:
            left_over.append(piece.text)
            continue
        tokens, free = tokenizer.tokens(piece.text), room - len(row)
        row += zip(tokens.ids[:free], itertools.repeat(piece.weight))
        left_over.append(tokens.text_from(free) if free else tokens.text)
        is_cut = len(tokens.ids) > free
    yield row, "".join(left_over) if is_cut else ""  # what is left over may be spaces alone


def _framed(tokenizer: ClipTokenizer, row: _Row) -> Chunk:
    weights = (1.0, *(weight for _, weight in row))
    padding = (1.0,) * (tokenizer.max_length - len(weights))
    return Chunk(tokenizer.framed([token for token, _ in row]), weights + padding)
