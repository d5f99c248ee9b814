"""Where a large picture is cut into tiles, each seen with its surroundings."""

from collections.abc import Iterator
from typing import NamedTuple

TILE = 256  # pixels of a picture a side, without its surroundings
MIN_TILE = 32
# Pixels around a tile that are computed and thrown away. A multiple of the windows that transformers attend in.
OVERLAP = 32


class Tile(NamedTuple):
    """Columns and rows [left, right) and [top, bottom) of a picture, and how much more is seen on each side."""

    left: int
    top: int
    right: int
    bottom: int
    before: tuple[int, int]  # columns, rows
    after: tuple[int, int]

    @property
    def source(self) -> tuple[slice, slice]:
        """What is seen of the picture."""
        rows = slice(self.top - self.before[1], self.bottom + self.after[1])
        return rows, slice(self.left - self.before[0], self.right + self.after[0])

    def target(self, scale: int) -> tuple[slice, slice]:
        """The tile's place in the picture that is `scale` times as large."""
        return slice(self.top * scale, self.bottom * scale), slice(self.left * scale, self.right * scale)

    def inner(self, scale: int) -> tuple[slice, slice]:
        """The tile in what is made of its source."""
        left, top = self.before[0] * scale, self.before[1] * scale
        width, height = (self.right - self.left) * scale, (self.bottom - self.top) * scale
        return slice(top, top + height), slice(left, left + width)


def tiles(width: int, height: int, size: int, overlap: int) -> Iterator[Tile]:
    """Tiles of `size` pixels a side that cover a picture, row by row; a picture that one can see is one."""
    if max(width, height) <= size + 2 * overlap:
        size = max(width, height)
    for top in range(0, height, size):
        for left in range(0, width, size):
            right, bottom = min(left + size, width), min(top + size, height)
            before = min(overlap, left), min(overlap, top)
            yield Tile(left, top, right, bottom, before, (min(overlap, width - right), min(overlap, height - bottom)))
