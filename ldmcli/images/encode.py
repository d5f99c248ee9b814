"""Pixels and text to the bytes of a PNG, JPEG or WebP file, by Pillow, which is imported at the first picture or by
`prepare`.

Level 1 with run-length matching suits decoded latents, which are smooth plus noise. Measured with Pillow 13 on one
thread, a picture of 512×512 by the embedded model, and one of 1024×1024 with the noise of a photograph: 15 ms and
255 KiB, 80 ms and 2.0 MiB. Default matching takes at level 1 16 ms and 309 KiB, 115 ms and 2.1 MiB; at Pillow's
default level 6 64 ms and 251 KiB, 154 ms and 2.0 MiB. A flat picture takes 1.6 KiB. Threads encode side by side.
"""

import io
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ldmcli.errors import printable
from ldmcli.images.exif import EXIF_KEYWORDS, exif_with
from ldmcli.images.formats import FORMATS, QUALITY, Encoding
from ldmcli.images.png_text import latin_text

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

_LEVEL, _RUN_LENGTHS = 1, 3  # of zlib: Z_RLE
_FINE_COLOURS = 90  # JPEG's quality from which colours get as many pixels as lightness does
_JPEG_LIMIT = 65_533  # bytes of EXIF, by the two bytes of a segment's length

_log = logging.getLogger(__name__)


def prepare() -> None:
    """Import what the first picture needs, which takes 20 to 30 ms: for a thread, beside the drawing."""
    from PIL import Image

    Image.preinit()


def encode_pixels(pixels: "np.ndarray", text: Mapping[str, str], encoding: Encoding = Encoding()) -> bytes:
    """A whole file: `pixels` (H, W, 3) uint8 RGB, and the items of `text` as `encode_image` keeps them.

    Raises ValueError when the pixels have another shape or type; and as `encode_image` does.
    """
    from PIL import Image

    if pixels.dtype != "uint8" or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels must be uint8 (H, W, 3), not {pixels.dtype} {pixels.shape}")
    return encode_image(Image.fromarray(pixels), text, encoding)


def encode_image(image: "Image.Image", text: Mapping[str, str], encoding: Encoding = Encoding()) -> bytes:
    """A whole file of a picture that Pillow holds. A PNG has a text chunk before the pixels for each item of `text`; a
    JPEG or WebP has in its EXIF what EXIF has a place for, and the log says what was left out.

    Raises ValueError when a keyword is not 1 to 79 Latin-1 characters, or a text holds a NUL or a lone surrogate;
    UsageError where the format cannot hold the size.
    """
    encoding.check_size(*image.size)
    file = io.BytesIO()
    if encoding.format == "png":
        image.save(file, "PNG", pnginfo=_chunks(text), compress_level=_LEVEL, compress_type=_RUN_LENGTHS)
        return file.getvalue()
    quality = encoding.quality or QUALITY
    settings: dict[str, Any] = {"quality": quality}
    if encoding.lossless:
        settings = {"lossless": True, "exact": True}  # under transparency too
    elif encoding.format == "jpeg" and quality >= _FINE_COLOURS:
        settings["subsampling"] = "4:4:4"
    image.save(file, encoding.format, exif=_exif(text, encoding), **settings)
    return file.getvalue()


def _chunks(text: Mapping[str, str]) -> "PngInfo":
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for keyword, value in text.items():
        if not 1 <= len(keyword) <= 79 or "\0" in keyword + value:
            raise ValueError(f"PNG text {keyword!r}: the keyword takes 1 to 79 characters, and neither part a NUL")
        # As tEXt where readers get it back from that, else as iTXt.
        add = chunks.add_text if latin_text(value.encode("latin-1", "ignore")) == value else chunks.add_itxt
        add(keyword, value)
    return chunks


def _exif(text: Mapping[str, str], encoding: Encoding) -> bytes:
    """As much of `text` as the format holds; the record, from which the picture can be drawn again, before the rest."""
    kept = {keyword: value for keyword, value in text.items() if keyword in EXIF_KEYWORDS}
    exif = exif_with(kept)
    if encoding.format == "jpeg":
        for keyword in EXIF_KEYWORDS:
            if len(exif) > _JPEG_LIMIT:
                kept.pop(keyword, None)
                exif = exif_with(kept)
    if lost := ", ".join(printable(keyword) for keyword in text if keyword not in kept):
        title = FORMATS[encoding.format].title
        _log.warning("%s has no room for all of the picture's metadata; left out: %s; a PNG keeps it", title, lost)
    return exif
