"""How large a picture is to become, and the way there: a network as often as it takes, then Lanczos."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from ldmcli.errors import UsageError, printable
from ldmcli.spec import MAX_SIZE
from ldmcli.speed.memory import gib, host_memory

if TYPE_CHECKING:
    import numpy as np

    from ldmcli.upscaling.upscaler import OnTile

MAX_SCALE = 64.0
_MAX_PASSES = 3  # of a network: what it makes of its own pictures gets no better


@dataclasses.dataclass(frozen=True)
class Target:
    """How large: `scale` times, or `width` × `height` pixels, of which one may be None and follows from the picture.
    All None: as the network makes it. Raises UsageError for what is out of range."""

    scale: float | None = None
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not 1 / MAX_SCALE <= self.scale <= MAX_SCALE:
            raise UsageError(f"scale {self.scale:g} is not a number from {1 / MAX_SCALE:g} to {MAX_SCALE:g}.")
        if self.scale is not None and (self.width or self.height):
            raise UsageError("--scale and --size both say how large; give one of them.")
        for side in (self.width, self.height):
            if side is not None and not 1 <= side <= MAX_SIZE:
                raise UsageError(f"a side of {side} pixels is not from 1 to {MAX_SIZE}.")

    def size(self, width: int, height: int, scale: int) -> tuple[int, int]:
        """Width and height that a picture becomes with a network that makes it `scale` times as large."""
        if self.width or self.height:
            wide = self.width or max(1, round(width * (self.height or 0) / height))
            return wide, self.height or max(1, round(height * wide / width))
        factor = scale if self.scale is None else self.scale
        return max(1, round(width * factor)), max(1, round(height * factor))


def parse_size(text: str) -> tuple[int | None, int | None]:
    """The sides in WxH, Wx or xH. Raises UsageError for anything else."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) != 2 or not any(sides) or not all(side.isascii() and side.isdecimal() for side in sides if side):
        raise UsageError(f"size {printable(repr(text))} is not WIDTHxHEIGHT, WIDTHx or xHEIGHT.")
    width, height = (int(side[:10]) if side else None for side in sides)
    return width, height


class Enlarger(Protocol):
    """What makes pictures `scale` times as large; `settings` are what its pictures depend on beside its weights."""

    name: str
    scale: int

    @property
    def settings(self) -> Mapping[str, str]: ...

    def enlarged(
        self, pixels: "np.ndarray", *, tile: int | None = None, on_tile: "OnTile | None" = None
    ) -> "np.ndarray":
        """See `Upscaler.enlarged`."""
        ...


def upscaled(
    upscaler: Enlarger,
    pixels: "np.ndarray",
    target: Target,
    *,
    tile: int | None = None,
    on_tile: "OnTile | None" = None,
) -> "np.ndarray":
    """`pixels` (height, width, 3 or 4) uint8 in the size of `target`, enlarged by the network, as often as that takes,
    three times at most, and brought to the exact size by Lanczos; what has other proportions is cut at both ends.
    Raises as `Upscaler.enlarged` does."""
    import numpy as np
    from PIL import Image, ImageOps

    width, height = target.size(pixels.shape[1], pixels.shape[0], upscaler.scale)
    for _ in range(_MAX_PASSES):
        pixels = upscaler.enlarged(pixels, tile=tile, on_tile=on_tile)
        if upscaler.scale == 1 or (pixels.shape[1] >= width and pixels.shape[0] >= height):
            break
    if (pixels.shape[1], pixels.shape[0]) == (width, height):
        return pixels
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (width, height), Image.Resampling.LANCZOS))


def check_memory(width: int, height: int) -> None:
    """Raise UsageError for a picture of RGB that this machine's memory cannot hold."""
    needed, available = 3 * width * height, host_memory()
    if available and needed > available:
        raise UsageError(
            f"a picture of {width}×{height} needs at least {gib(needed)} of memory, and this machine has "
            f"{gib(available)}; give a smaller one."
        )
