"""Prompts to chunks: the rows of token ids, with a weight for each token, that a text encoder reads one by one."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from ldmcli.conditioning.syntax import Piece, parse
from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.conditioning.words import NO_WORDS, Unit, Word, Words, occurring, units
from ldmcli.errors import BadDataError, UsageError

_BACKTRACK = 20  # A1111's comma_padding_backtrack
_MAX_CHUNKS = 128  # 9600 tokens; the U-Net's attention grows with every one

_Row = list[tuple[Unit, float]]  # without begin and end marks, with weights


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a text encoder reads at once: token ids, begin and end marks and padding included, and as many weights.
    The id -1 - k stands for the k-th vector of the prompt's words."""

    ids: tuple[int, ...]  # max_length of them
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt's chunks, at least one, and what did not fit into them ("" if all did). `words` are those it has that
    stand for vectors, each once, in the order in which their vectors are counted."""

    chunks: tuple[Chunk, ...]
    cut_text: str
    words: tuple[Word, ...] = ()


def tokenize(
    tokenizer: ClipTokenizer, prompt: str, *, syntax: str = "plain", chunked: bool = False, words: Words = NO_WORDS
) -> TokenizedPrompt:
    """The prompt for an encoder that reads `tokenizer.max_length` tokens, two of them marks.

    syntax: "plain", the prompt as typed, or "weighted" (`prompt_syntax`), where each BREAK starts a new chunk.
    chunked: text that is too long goes on in further chunks as in AUTOMATIC1111's web UI; else it is cut.
    words: stand for vectors where the prompt has them; those of one are never in two chunks.

    Raises UsageError for a prompt of too many chunks and as `parse` does, and LdmError for a word without vectors.
    """
    room = tokenizer.max_length - 2
    if room < 1:
        raise BadDataError(f"a text encoder of {tokenizer.max_length} tokens reads no prompt.")
    words = occurring(words, prompt)
    sections = _sections(parse(prompt) if syntax == "weighted" else [Piece(prompt, 1.0)])
    read = _all_rows if chunked else _first_row
    found = itertools.chain.from_iterable(read(tokenizer, section, words, room) for section in sections)
    rows = list(itertools.islice(found, _MAX_CHUNKS + 2))
    if len(rows) > 1 and not rows[-1][0]:
        rows.pop()  # a BREAK at the very end adds no chunk
    if len(rows) > _MAX_CHUNKS:
        raise UsageError(f"a prompt is longer than {_MAX_CHUNKS} chunks of {room} tokens.")
    places: dict[Word, range] = {}
    chunks = tuple(_framed(tokenizer, row, places) for row, _ in rows)
    return TokenizedPrompt(chunks, " … ".join(cut for _, cut in rows if cut), tuple(places))


def _sections(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces between BREAKs."""
    section: list[Piece] = []
    for piece in pieces:
        if piece.after_break:
            yield section
            section = []
        section.append(piece)
    yield section


def _all_rows(
    tokenizer: ClipTokenizer, section: Sequence[Piece], words: Words, room: int
) -> Iterator[tuple[_Row, str]]:
    """All tokens. A full chunk ends after its last comma if that is among its last 20 tokens; but a comma that opens
    the next chunk does not take along what precedes it, nor does a word that is too long for the rest of a chunk."""
    row: _Row = []
    filled = 0
    for piece in section:
        for unit in units(tokenizer, piece.text, words)[1]:
            if filled == room and unit.token != tokenizer.comma_id:
                end = _after_comma(row, tokenizer.comma_id)
                yield row[:end], ""
                row = row[end:]
                filled = sum(kept.size for kept, _ in row)
            if filled + unit.size > room:
                yield row, ""
                row, filled = [], 0
            row.append((unit, piece.weight))
            filled += unit.size
    yield row, ""


def _after_comma(row: _Row, comma_id: int | None) -> int:
    """How much of a full row ends with its last comma, if that is among its last tokens; else all."""
    behind = 0
    for end in range(len(row), 0, -1):
        unit = row[end - 1][0]
        behind += unit.size
        if behind > _BACKTRACK:
            break
        if unit.word is None and unit.token == comma_id:
            return end
    return len(row)


def _first_row(
    tokenizer: ClipTokenizer, section: Sequence[Piece], words: Words, room: int
) -> Iterator[tuple[_Row, str]]:
    """The tokens that fit into one chunk, and the text that does not."""
    row: _Row = []
    left_over, is_cut, free = [], False, room
    for piece in section:
        if is_cut:
            left_over.append(piece.text)
            continue
        text, found = units(tokenizer, piece.text, words)
        if not free:
            left_over.append(text)
            is_cut = bool(found)
            continue
        for unit in found:
            if unit.size > free:
                left_over.append(text[unit.start :])
                is_cut = True
                break
            row.append((unit, piece.weight))
            free -= unit.size
    yield row, "".join(left_over) if is_cut else ""  # what is left over may be spaces alone


def _framed(tokenizer: ClipTokenizer, row: _Row, places: dict[Word, range]) -> Chunk:
    """The row between marks and padding. `places` has the ids of each word's vectors, and gets those of new ones."""
    ids: list[int] = []
    weights = [1.0]
    for unit, weight in row:
        if unit.word is None:
            ids.append(unit.token)
        else:
            if unit.word not in places:
                first = -1 - sum(map(len, places.values()))
                places[unit.word] = range(first, first - unit.size, -1)
            ids += places[unit.word]
        weights += [weight] * unit.size
    padding = [1.0] * (tokenizer.max_length - len(weights))
    return Chunk(tokenizer.framed(ids), (*weights, *padding))
