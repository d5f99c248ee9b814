"""Pictures that clients send, looked at before they are unpacked."""

import base64
import binascii
import io
import re
from typing import TYPE_CHECKING, Any

from ldmcli.serving.http.limits import MAX_UPLOAD_PIXELS, Refused

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("PNG", "JPEG", "WEBP")  # of strangers' pictures no more, whatever Pillow reads
_DATA = re.compile(r"data:[\w/.+-]{0,100};base64,")


def picture_bytes(value: Any, field: str) -> bytes:
    """The bytes of a picture in base64, with or without `data:…;base64,` before it. Raises Refused, for addresses
    too."""
    if not isinstance(value, str):
        raise Refused(f"{field} must be a picture in base64, not {type(value).__name__}.", field=field)
    if value[:8].lower().startswith(("http://", "https://", "file:", "ftp://")):
        raise Refused(f"{field} is an address, and none is fetched; send the picture in base64.", field=field)
    if found := _DATA.match(value):
        value = value[found.end() :]
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"{field} is not base64.", field=field) from None
    return checked_picture(data, field)


def checked_picture(data: bytes, field: str) -> bytes:
    """The bytes of a picture, looked at: what is none, or too large, is refused before it is unpacked. Imports
    Pillow."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            width, height = picture.size
    except Exception:  # Pillow's plugins raise nearly anything of damaged files
        raise Refused(f"{field} is no picture that can be read; send PNG, JPEG or WebP.", field=field) from None
    if width * height > MAX_UPLOAD_PIXELS:
        size = f"{width}×{height}"
        raise Refused(f"{field} has {size} pixels; at most {MAX_UPLOAD_PIXELS >> 20} million are read.", field=field)
    return data


def mask_of(data: bytes) -> bytes:
    """A mask, white where it is repainted, of a picture that says so by its brightness, or as AUTOMATIC1111 reads it by
    its opacity where it can be seen through. Raises LdmError."""
    from ldmcli.images.pixels import read_picture

    mask = read_picture(data)
    return data if mask.mode != "RGBA" else _as_png(mask.getchannel("A"))


def mask_of_transparency(data: bytes, field: str) -> bytes:
    """A mask, white where it is repainted, of a picture that is transparent there. Raises Refused, LdmError."""
    from PIL import ImageOps

    from ldmcli.images.pixels import read_picture

    mask = read_picture(data)
    if mask.mode != "RGBA":
        raise Refused(f"{field} has no transparency, which says what is repainted.", field=field)
    return _as_png(ImageOps.invert(mask.getchannel("A")))


def _as_png(picture: "Image.Image") -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def has_transparency(data: bytes) -> bool:
    """Whether a picture can be seen through. Raises LdmError."""
    from ldmcli.images.pixels import facts_of

    return facts_of(data).transparent
