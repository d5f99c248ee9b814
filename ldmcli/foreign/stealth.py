"""Texts hidden in the lowest bits of pixels, as NovelAI and some extensions of AUTOMATIC1111 do ("stealth pnginfo")."""

import json
import zlib
from pathlib import Path

from ldmcli.errors import LdmError

_MAGIC = {"stealth_pnginfo": 1, "stealth_pngcomp": 1, "stealth_rgbinfo": 3, "stealth_rgbcomp": 3}  # channels used
_LENGTH = len("stealth_pnginfo")
_MOST_BYTES, _MOST_PIXELS = 1 << 20, 1 << 24


def read_stealth(path: Path) -> dict[str, str]:
    """The texts in the pixels of a PNG or lossless WebP by keyword; none where it holds none."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "WEBP")) as image:
            if image.mode not in ("RGB", "RGBA") or image.width * image.height > _MOST_PIXELS:
                return {}
            pixels = np.asarray(image).transpose(1, 0, 2)  # column by column
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, LdmError):
        return {}
    for channels in (pixels[..., 3:], pixels[..., :3]):
        data = np.packbits(channels[: -(-8 * (_MOST_BYTES + 64) // len(channels[0]))].ravel() & 1).tobytes()
        magic = data[:_LENGTH].decode("latin-1")
        if magic not in _MAGIC or channels.shape[2] != _MAGIC[magic]:
            continue
        size = int.from_bytes(data[_LENGTH : _LENGTH + 4], "big") // 8
        body = data[_LENGTH + 4 : _LENGTH + 4 + size]
        if size > _MOST_BYTES or len(body) < size:
            return {}
        return _texts(body, packed=magic.endswith("comp"))
    return {}


def _texts(body: bytes, *, packed: bool) -> dict[str, str]:
    try:
        data = zlib.decompressobj(31).decompress(body, _MOST_BYTES) if packed else body
        text = data.decode()
    except (zlib.error, UnicodeDecodeError):
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {"parameters": text}
    texts = found.items() if isinstance(found, dict) else ()
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in texts}
