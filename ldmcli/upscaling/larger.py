"""A picture's file, and the larger one made of it, with what it says of itself."""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ldmcli.errors import BadDataError
from ldmcli.images.formats import Encoding, format_of_file
from ldmcli.upscaling.target import Enlarger, Target, check_memory, upscaled

if TYPE_CHECKING:
    from PIL import Image

    from ldmcli.upscaling.upscaler import OnTile

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Enlargement:
    """How pictures become larger files: how large, in what format, with or without what they say of themselves, in
    tiles of so many pixels a side, or as many as suit."""

    target: Target
    encoding: Encoding
    metadata: bool
    tile: int | None


def read_file(source: Path, how: Enlargement) -> "tuple[Image.Image, dict[str, str]]":
    """A picture, and what it says of itself. Raises BadDataError where it cannot be read."""
    from ldmcli.images.pixels import on_white, read_picture

    picture = read_picture(str(source))
    text = _text_of(source) if how.metadata else {}
    if how.encoding.format == "jpeg" and picture.mode == "RGBA":
        _log.warning("JPEG has no transparency; what is transparent becomes white")
        picture = on_white(picture)
    return picture, text


def larger_file(
    picture: "Image.Image", text: dict[str, str], upscaler: Enlarger, how: Enlargement, on_tile: "OnTile"
) -> tuple[bytes, tuple[int, int]]:
    """The bytes of the larger picture's file, and its size. Raises UsageError where that is too large."""
    import numpy as np
    from PIL import Image

    from ldmcli.images.encode import encode_image
    from ldmcli.images.metadata import with_upscaling

    size = how.target.size(*picture.size, upscaler.scale)
    how.encoding.check_size(*size)
    check_memory(*size)
    large = upscaled(upscaler, np.asarray(picture), how.target, tile=how.tile, on_tile=on_tile)
    if how.metadata:
        exact = how.target.width or how.target.height
        by = None if exact else how.target.scale or upscaler.scale
        text = with_upscaling(text, upscaler.name, by=by, size=size, settings=upscaler.settings)
    return encode_image(Image.fromarray(large), text, how.encoding), size


def _text_of(source: Path) -> dict[str, str]:
    """What a picture says of itself, of each keyword the first; what is damaged is left out with a word."""
    from ldmcli.images.metadata import iterate_picture_text

    text: dict[str, str] = {}
    if format_of_file(source):
        try:
            for keyword, value in iterate_picture_text(source):
                text.setdefault(keyword, value)
        except BadDataError as error:
            _log.warning("%s; its result says no more than that", str(error).removesuffix("."))
    return text
