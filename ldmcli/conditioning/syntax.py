r"""The weighted prompt syntax of AUTOMATIC1111's web UI: text in, pieces with a weight each out.

    (word) = 1.1 · ((word)) = 1.21 · [word] = 1 / 1.1 · (word:1.3) · \( \) \[ \] \\ literally · BREAK: a new chunk

As there, brackets left open reach to the end, closing ones too many are text, a lone backslash vanishes, round and
square brackets may overlap, blanks around a weight mean nothing, and any weight goes, 0 and negative ones too. Not as
there: a weight that is no number or not finite is an error instead of a crash or a black picture, brackets nest no
deeper than 64, and BREAK works within brackets (there it becomes the word "break" with a negative weight). Source:
AUTOMATIC1111 wiki, "Features", sections Attention/emphasis and BREAK.
"""

import dataclasses
import math
import re

from ldmcli.errors import UsageError, printable

_ROUND, _SQUARE = 1.1, 1 / 1.1
_MAX_DEPTH = 64  # what a weight costs to compute; 64 round brackets already multiply by 446
_MARK = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?) | (?P<open>[(\[]) | :\s*(?P<weight>[+-]?[.\d]+)\s*\) | (?P<close>[)\]])", re.VERBOSE
)
# No whitespace around it in the expression: a search that retries within a megabyte of spaces is quadratic.
_BREAK = re.compile(r"\bBREAK\b")


@dataclasses.dataclass(frozen=True)
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
    end = 0
    for mark in _MARK.finditer(prompt):
        if end < mark.start():
            scan.add(prompt[end : mark.start()])
        end = mark.end()
        if mark["escaped"]:
            scan.add(mark["escaped"])
        elif mark["escaped"] == "":
            scan.end_text()  # the backslash goes, but what it keeps apart stays apart: `a\BREAK`, `(a[\]b)`
            scan.add("")
        elif mark["open"]:
            scan.open(mark["open"])
        elif mark["weight"] and scan.opened["("]:
            scan.close("(", _number(mark["weight"]))
        elif mark["close"] == ")" and scan.opened["("]:
            scan.close("(", _ROUND)
        elif mark["close"] == "]" and scan.opened["["]:
            scan.close("[", _SQUARE)
        else:
            scan.add(mark[0])
    if end < len(prompt):
        scan.add(prompt[end:])
    return _merged(scan.finish())


class _Scan:
    """The pieces so far, and for each kind of bracket the pieces at which those still open began."""

    def __init__(self) -> None:
        self.pieces: list[tuple[str, bool]] = []
        self.weights: list[float] = []
        self.opened: dict[str, list[int]] = {"(": [], "[": []}
        self._text: list[str] = []

    def add(self, text: str) -> None:
        self._text.append(text)

    def end_text(self) -> None:
        """Make pieces of the text since the last bracket; the whitespace around a BREAK goes."""
        if not self._text:
            return
        first, *others = _BREAK.split("".join(self._text))
        self._text.clear()
        self._append(first.rstrip() if others else first, after_break=False)
        for i, other in enumerate(others, 1):
            self._append(other.strip() if i < len(others) else other.lstrip(), after_break=True)

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
        for i in range(self.opened[bracket].pop(), len(self.weights)):
            self.weights[i] *= weight

    def finish(self) -> list[Piece]:
        """All pieces; brackets still open end here."""
        self.end_text()
        for bracket, weight in (("(", _ROUND), ("[", _SQUARE)):
            while self.opened[bracket]:
                self.close(bracket, weight)
        if not all(map(math.isfinite, self.weights)):
            raise UsageError("a prompt's weights multiply to a number that is not finite.")
        return [Piece(text, w, is_break) for (text, is_break), w in zip(self.pieces, self.weights, strict=True)]

    def _append(self, text: str, *, after_break: bool) -> None:
        self.pieces.append((text, after_break))
        self.weights.append(1.0)


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
    groups: list[list[Piece]] = []
    for piece in pieces:
        if groups and not piece.after_break and piece.weight == groups[-1][0].weight:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    merged = [dataclasses.replace(group[0], text="".join(piece.text for piece in group)) for group in groups]
    return merged or [Piece("", 1.0)]
