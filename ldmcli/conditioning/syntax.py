r"""The weighted prompt syntax of AUTOMATIC1111's web UI: text in, pieces with a weight each out.

    (word) = 1.1 · ((word)) = 1.21 · [word] = 1 / 1.1 · (word:1.3) · \( \) \[ \] \\ literally · BREAK: a new chunk

As there, brackets left open reach to the end, closing ones too many are text, a lone backslash vanishes, round and
square brackets may overlap, blanks around a weight mean nothing, and any weight goes, 0 and negative ones too. Not as
there: a weight that is no number or not finite is an error instead of a crash or a black picture, brackets nest no
deeper than 64, and BREAK works within brackets (there it becomes the word "break" with a negative weight). Source:
AUTOMATIC1111 wiki, "Features", sections Attention/emphasis and BREAK.
"""

import dataclasses
import itertools
import math
import re

from ldmcli.errors import UsageError, printable

_WEIGHTS = {"(": 1.1, "[": 1 / 1.1}  # of all between the bracket and its closing one
_OPENING = {")": "(", "]": "["}
_MAX_DEPTH = 64  # what a weight costs to compute; 64 round brackets already multiply by 446
_MARK = re.compile(
    r"""\\(?P<escaped>[()\[\]\\]?) | (?P<open>[(\[]) | :\s*(?P<weight>[+-]?[.\d]+)\s*\) | (?P<close>[)\]])
    | (?P<text>[^()\[\]\\:]+|:)""",
    re.VERBOSE,
)
# No whitespace around it in the expression: a search that retries within a megabyte of spaces is quadratic.
_BREAK = re.compile(r"\bBREAK\b")


@dataclasses.dataclass
class Piece:
    """Text of one weight. `after_break`: it starts a new chunk, even where it is empty."""

    text: str
    weight: float
    after_break: bool = False


def parse(prompt: str) -> list[Piece]:
    """The prompt's pieces, never none; neighbours differ in weight or stand at a BREAK.

    Time is linear in the prompt's length. Raises UsageError for a weight that is no finite number and for brackets
    nested too deep.
    """
    scan = _Scan()
    for mark in _MARK.finditer(prompt):
        kind = mark.lastgroup
        if kind == "open":
            scan.open(mark[0])
        elif kind == "escaped":
            if not mark["escaped"]:
                scan.end_text()  # the backslash goes, but what it keeps apart stays apart: `a\BREAK`, `(a[\]b)`
            scan.text.append(mark["escaped"])
        elif kind in ("weight", "close") and scan.opened[opening := _OPENING[mark[0][-1]]]:
            scan.close(opening, _WEIGHTS[opening] if kind == "close" else _number(mark["weight"]))
        else:
            scan.text.append(mark[0])
    scan.end_text()
    for opening, starts in scan.opened.items():
        while starts:
            scan.close(opening, _WEIGHTS[opening])
    if not all(math.isfinite(piece.weight) for piece in scan.pieces):
        raise UsageError("a prompt's weights multiply to a number that is not finite.")
    return _merged(scan.pieces)


class _Scan:
    """The pieces so far, the text since the last of them, and for each kind of bracket the pieces at which those still
    open began."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.text: list[str] = []
        self.opened: dict[str, list[int]] = {"(": [], "[": []}

    def end_text(self) -> None:
        """Make pieces of the text since the last bracket; the whitespace around a BREAK goes."""
        if not self.text:
            return
        texts = _BREAK.split("".join(self.text))
        self.text.clear()
        for i, text in enumerate(texts):
            text = text.lstrip() if i else text
            self.pieces.append(Piece(text.rstrip() if i < len(texts) - 1 else text, 1.0, after_break=i > 0))

    def open(self, bracket: str) -> None:
        self.end_text()
        self.opened[bracket].append(len(self.pieces))
        if sum(map(len, self.opened.values())) > _MAX_DEPTH:
            raise UsageError(
                f"a prompt's brackets are nested more than {_MAX_DEPTH} deep; write (text:weight), or \\( for a "
                "bracket that is text."
            )

    def close(self, bracket: str, weight: float) -> None:
        """Multiply all since the last such bracket: innermost first, since weights are compared to the last bit."""
        self.end_text()
        for piece in self.pieces[self.opened[bracket].pop() :]:
            piece.weight *= weight


def _number(text: str) -> float:
    """A weight as A1111 reads it; it knows no exponent."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(f"“{printable(text, 40)}” in a prompt is no weight; write \\( for a bracket that is text.")
    return weight


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of the same weight as one piece: they are tokenised together."""
    sections = itertools.accumulate(piece.after_break for piece in pieces)
    groups = itertools.groupby(zip(pieces, sections, strict=True), lambda pair: (pair[0].weight, pair[1]))
    merged = []
    for _, group in groups:
        first, *others = (piece for piece, _ in group)
        merged.append(dataclasses.replace(first, text="".join([first.text, *(piece.text for piece in others)])))
    return merged or [Piece("", 1.0)]
