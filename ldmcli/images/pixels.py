"""Pictures that users name, as pixels: common formats by Pillow, upright, in sRGB, on white.

They may come from anyone: a picture is looked at before memory is spent on it, and what is wrong is one sentence.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ldmcli.disk.opening import open_regular, shown
from ldmcli.errors import BadDataError, MissingInputError, printable

# No format that runs other programs or draws what it describes.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 1 << 26  # 8192²: a quarter of a gigabyte, and several times that while it is converted
MAX_BYTES = 1 << 28
_CURE = "name a picture file, such as PNG, JPEG or WebP"
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_JPEG = b"\xff\xd8"  # how its files begin
_GREY = 16  # how far apart the colours of a grey picture may be, which JPEG may have coloured
_Read = TypeVar("_Read")
_WIDE = {"I;16", "I;16L", "I;16B", "I;16N", "I"}  # numbers of 16 bits, as Pillow gives them


@dataclasses.dataclass(frozen=True)
class Facts:
    """A picture that was read whole: its size once it is upright, the SHA-256 of its file, its darkest and its lightest
    grey as a mask or a depth map, and whether it can be seen through."""

    width: int
    height: int
    sha256: str
    greys: tuple[float, float]
    transparent: bool = False

    @property
    def shape(self) -> str:
        """Its size in words."""
        return f"{self.width}×{self.height}"


def read_picture(source: str | bytes) -> Image.Image:
    """A picture by its path or its file's bytes, upright: RGB, or RGBA where it has transparency.

    Raises MissingInputError, BadDataError or StorageError saying what it is instead.
    """
    return _decoded(_bytes_of(source), _named(source), _in_colour)


def read_depth(source: str | bytes) -> np.ndarray:
    """A depth map (height, width) float32 by its path or its file's bytes, upright, in the numbers that it is kept in.
    Raises as `read_picture` does, and BadDataError for one that has colours."""
    return _decoded(_bytes_of(source), _named(source), _as_depth)


def read_classes(source: str | bytes) -> np.ndarray:
    """A semantic map (height, width) int64 by its path or its file's bytes: each pixel the number of its class, which a
    palette may colour. Raises as `read_picture` does, and BadDataError for one that has colours, or may have other
    numbers than it was saved with."""
    data, name = _bytes_of(source), _named(source)
    if data.startswith(_JPEG):
        raise BadDataError(f"{name} is a JPEG, whose pixels are only about what was saved, and a semantic map has "
                           "numbers of classes; save it as PNG.")  # fmt: skip
    return _decoded(data, name, _as_classes)


def facts_of(source: str | bytes, *, depth: bool = False) -> Facts:
    """What is known of a picture, or a depth map, read whole, once for each state of its file. Raises as `read_picture`
    and `read_depth` do."""
    if isinstance(source, bytes):
        return _facts.__wrapped__(source, None, depth)  # nobody gives the same again, and it would fill the memory
    stamp = None
    with contextlib.suppress(OSError, ValueError):
        found = os.stat(source)
        stamp = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return _facts(source, stamp, depth)


@functools.lru_cache(4096)
def _facts(source: str | bytes, stamp: object, depth: bool) -> Facts:
    data = _bytes_of(source)
    sha256 = hashlib.sha256(data).hexdigest()
    if depth:
        near = _decoded(data, _named(source), _as_depth)
        return Facts(near.shape[1], near.shape[0], sha256, (float(near.min()), float(near.max())))
    picture = _decoded(data, _named(source), _in_colour)
    grey = grey_of(picture)
    return Facts(*picture.size, sha256, (int(grey.min()), int(grey.max())), transparent=picture.mode == "RGBA")


def grey_of(picture: Image.Image) -> np.ndarray:
    """A mask's brightness (height, width) uint8; what is transparent counts as black."""
    if picture.mode == "RGBA":
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(black, picture)
    return np.asarray(picture.convert("L"))


def on_white(picture: Image.Image) -> Image.Image:
    """The picture without its transparency."""
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture).convert("RGB")


def _named(source: str | bytes) -> str:
    return "the picture that was given as data" if isinstance(source, bytes) else shown(Path(source))


def _bytes_of(source: str | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    if _ADDRESS.match(source):
        raise MissingInputError(f"{printable(source)} is an address, and pictures are read from files; fetch it first.")
    with open_regular(Path(source), ("", _CURE)) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise BadDataError(f"{_named(source)} is a file of {size >> 20} MiB; at most {MAX_BYTES >> 20} are read.")
        return file.readall()


def _decoded(data: bytes, name: str, convert: Callable[[Image.Image, str], _Read]) -> _Read:
    if not data:
        raise BadDataError(f"{name} is empty; {_CURE}.")
    with _named_errors(name), Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise BadDataError(
                f"{name} has {picture.width}×{picture.height} pixels; at most {MAX_PIXELS >> 20} million are read, so "
                "make it smaller first."
            )
        frames = 1 if picture.format == "MPO" else int(getattr(picture, "n_frames", 1))
        if frames > 1:
            raise BadDataError(
                f"{name} is animated or has pages ({frames}); save the one to use as a picture by itself."
            )
        picture.load()
        return convert(ImageOps.exif_transpose(picture), name)


def _as_depth(picture: Image.Image, name: str) -> np.ndarray:
    if picture.mode in (*_WIDE, "F"):
        found = np.asarray(picture).astype(np.float32)
        if not np.isfinite(found).all():
            raise BadDataError(f"{name} has numbers that are not finite, and so is no depth map.")
        return found
    colours = np.asarray(picture.convert("RGB")).astype(np.int16)
    if (colours.max(-1) - colours.min(-1)).max() > _GREY:
        raise BadDataError(f"{name} has colours, and a depth map is grey: nearer is brighter.")
    return colours.mean(-1, dtype=np.float32)


def _as_classes(picture: Image.Image, name: str) -> np.ndarray:
    if picture.mode not in ("1", "L", "P", *_WIDE):
        raise BadDataError(
            f"{name} is no semantic map: those are grey or have a palette, each pixel the number of its class."
        )
    return np.asarray(picture).astype(np.int64)


def _in_colour(picture: Image.Image, name: str) -> Image.Image:
    """The picture as RGB, or RGBA where it has transparency."""
    if picture.mode == "F":
        raise BadDataError(f"{name} has floating numbers as pixels; save it with 8 or 16 bits a colour first.")
    if picture.mode in _WIDE:
        wide = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    found = _in_srgb(picture)
    if picture.has_transparency_data:
        found.putalpha(picture.convert("RGBA").getchannel("A"))
    return found


def _in_srgb(picture: Image.Image) -> Image.Image:
    """The picture's colours (RGB) as a screen shows them; as they stand where its profile says nothing, or is
    damaged."""
    plain = picture.convert("RGBA").convert("RGB") if picture.has_transparency_data else picture.convert("RGB")
    profile = picture.info.get("icc_profile")
    if not isinstance(profile, bytes):
        return plain
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" not in ImageCms.getProfileDescription(own).lower().replace(" ", ""):
            source = picture if picture.mode in ("CMYK", "L") else plain
            return ImageCms.profileToProfile(source, own, ImageCms.createProfile("sRGB"), outputMode="RGB") or plain
    return plain


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """What Pillow raises of a damaged file as one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, which are refused here, and of damaged metadata
            yield
    except BadDataError:
        raise
    except UnidentifiedImageError:
        raise BadDataError(f"{name} is no picture that can be read; {_CURE}.") from None
    except Image.DecompressionBombError:
        limit = f"at most {MAX_PIXELS >> 20} million are read"
        raise BadDataError(f"{name} has too many pixels, {limit}; make it smaller first.") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything of damaged files
        reason = printable(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise BadDataError(f"{name} is damaged or cut off: {reason.rstrip('.')}.") from None
