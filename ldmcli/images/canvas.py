"""A request's picture brought to the size it is drawn in, what of it is repainted, and the result put back into it."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from ldmcli.disk.hashes import sha256_now
from ldmcli.disk.opening import shown
from ldmcli.errors import BadDataError
from ldmcli.fitting import FittedRequest
from ldmcli.images.pixels import Facts, facts_of, grey_of, on_white, read_depth, read_picture
from ldmcli.remarks import warn_once
from ldmcli.spec import ALPHA, PICTURES, GenerationRequest

_log = logging.getLogger(__name__)
_NOTHING = "the mask leaves nothing to repaint: white is what is repainted; see --invert-mask."
_FLAT = "the depth map is the same everywhere, so it says nothing; nearer is brighter."
_OPAQUE = "the picture has no transparency that could be its mask; name a --mask file."
_FILLS = (256, 64, 16, 4, 2, 0)  # radii of the blurs that grow colours into what is masked, as AUTOMATIC1111 has them
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What is drawn on: `pixels` (height, width, 3) uint8, and where they are repainted, `mask` (height, width) bool.
    `whole` is the picture that the result goes into, at `box`, as far as `shown` (of the whole's size, uint8) says;
    None where the result is all. `depth`, of any size and float32, is how near the pixels are, where that is known."""

    pixels: np.ndarray
    mask: np.ndarray | None = None
    whole: np.ndarray | None = None
    shown: np.ndarray | None = None
    box: Box = (0, 0, 0, 0)
    depth: np.ndarray | None = None

    def finished(self, drawn: np.ndarray) -> np.ndarray:
        """The picture (height, width, 3) uint8 with what was drawn put into it; bit for bit as it was where nothing of
        that shows."""
        if self.whole is None or self.shown is None:
            return drawn
        left, top, right, bottom = self.box
        if drawn.shape[:2] != (bottom - top, right - left):
            size = right - left, bottom - top
            drawn = np.asarray(Image.fromarray(drawn).resize(size, Image.Resampling.LANCZOS))
        found = self.whole.copy()
        before = found[top:bottom, left:right].astype(np.int32)
        share = self.shown[top:bottom, left:right, None].astype(np.int32)
        found[top:bottom, left:right] = (before * (255 - share) + drawn * share + 127) // 255
        return found


def canvas_of(request: FittedRequest) -> Canvas:
    """The canvas of a request that has an image. Raises as `read_picture` and `read_depth` do, and BadDataError for a
    mask that leaves nothing to repaint."""
    canvas = _coloured(request)
    if request.depth is None:
        return canvas
    assert request.image is not None
    depth, picture = Image.fromarray(read_depth(request.depth)), facts_of(request.image)
    masked = canvas.whole is not None and request.inpaint_area == "masked"
    if masked or request.resize != "stretch":  # else the first size that it is brought to is the latents'
        depth = depth.resize((picture.width, picture.height), Image.Resampling.BICUBIC)
        depth = depth.crop(canvas.box) if masked else resized(depth, request.width, request.height, request.resize)
    return dataclasses.replace(canvas, depth=_array(depth))


def _coloured(request: FittedRequest) -> Canvas:
    """The canvas without the depth."""
    assert request.image is not None
    picture = read_picture(request.image)
    mask = _mask_of(request, picture)
    picture = on_white(picture)
    size = request.width // request.enlarges, request.height // request.enlarges
    if mask is None:
        return Canvas(_array(resized(picture, *size, request.resize)))
    if not (np.asarray(mask) > 127).any():
        raise BadDataError(_NOTHING)
    if request.inpaint_area == "masked":
        box = surroundings(np.asarray(mask), request.mask_padding, request.width / request.height)
        part, of_mask = (each.crop(box).resize(size, Image.Resampling.LANCZOS) for each in (picture, mask))
        whole, shown = picture, mask
    else:
        part, of_mask = (resized(each, *size, request.resize) for each in (picture, mask))
        whole, shown, box = part, of_mask, (0, 0, *size)
    repainted = np.asarray(of_mask) > 127
    if not repainted.any():  # a few pixels of a large picture are lost on the way to its size
        raise BadDataError(_NOTHING)
    if request.masked_content == "fill":
        part = _filled(part, of_mask)
    if not request.paste_back and request.inpaint_area == "whole":
        return Canvas(_array(part), repainted)
    if not request.paste_back:
        shown = Image.new("L", whole.size, 255)
    return Canvas(_array(part), repainted, _array(whole), np.asarray(shown), box)


def resized(picture: Image.Image, width: int, height: int, how: str) -> Image.Image:
    """The picture at another size: stretched to it, scaled to cover it and cropped, or scaled to fit into it with its
    edges continued."""
    if picture.size == (width, height):
        return picture
    if how == "crop":
        return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    if how == "stretch":
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    scale = min(width / picture.width, height / picture.height)
    inner = min(width, max(1, round(picture.width * scale))), min(height, max(1, round(picture.height * scale)))
    pixels = np.asarray(picture.resize(inner, Image.Resampling.LANCZOS))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    beside = (top, height - inner[1] - top), (left, width - inner[0] - left)
    return Image.fromarray(np.pad(pixels, (*beside, *[(0, 0)] * (pixels.ndim - 2)), mode="edge"))


def surroundings(mask: np.ndarray, padding: int, aspect: float) -> Box:
    """The box around all that is masked and `padding` pixels more, grown to `aspect`, width over height, as far as the
    picture reaches."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    left, right = max(columns[0] - padding, 0), min(columns[-1] + 1 + padding, width)
    top, bottom = max(rows[0] - padding, 0), min(rows[-1] + 1 + padding, height)
    if (right - left) / (bottom - top) > aspect:
        top, bottom = _grown(top, bottom, round((right - left) / aspect), height)
    else:
        left, right = _grown(left, right, round((bottom - top) * aspect), width)
    return int(left), int(top), int(right), int(bottom)


def input_facts(request: GenerationRequest) -> dict[str, Facts]:
    """Of each picture that the request names, its size and hash; it says so where one is to be stretched. Raises as
    `read_picture` and `read_depth` do, and BadDataError where the mask can repaint nothing, or the depth map is
    flat."""
    given = {name: getattr(request, name) for name in PICTURES if (name, getattr(request, name)) != ("mask", ALPHA)}
    found = {name: facts_of(value, depth=name == "depth") for name, value in given.items() if value is not None}
    if request.mask == ALPHA and not found["image"].transparent:
        raise BadDataError(_OPAQUE)
    if "mask" in found:
        darkest, lightest = found["mask"].greys
        if (255 - darkest if request.invert_mask else lightest) <= 127:
            raise BadDataError(_NOTHING)
    if "depth" in found and found["depth"].greys[0] == found["depth"].greys[1]:
        raise BadDataError(_FLAT)
    for name in found.keys() - {"image"}:
        if not _alike(found[name], found["image"]):
            shapes = f"{found[name].shape} and the picture {found['image'].shape}"
            warn_once(_log, f"the {name} is {shapes}, which is of another shape: it is stretched to that")
    return found


def check_unchanged(request: FittedRequest) -> None:
    """Raise BadDataError where a picture's file, or an embedding's, is another now than when the request was fitted, or
    as `read_picture`: what is drawn says which it was made from."""
    known = {sha256 for _, sha256 in request.inputs}
    named = [(getattr(request, name), name == "depth") for name in PICTURES]
    named += [(control.image, False) for control in request.controls]
    named += [(value, False) for prompt in request.image_prompts for value in (prompt.image, prompt.mask)]
    for value, depth in named:
        if isinstance(value, str) and value != ALPHA and facts_of(value, depth=depth).sha256 not in known:
            raise BadDataError(f"{shown(Path(value))} has changed since it was checked; run again.")
    if request.image_embedding is not None and sha256_now(request.image_embedding) not in known:
        raise BadDataError(f"{shown(Path(request.image_embedding))} has changed since it was checked; run again.")


def _alike(one: Facts, other: Facts) -> bool:
    """Whether two pictures are of about the same shape, whatever their sizes."""
    across, down = one.width * other.height, one.height * other.width
    return abs(across - down) <= 0.02 * max(across, down)


def _grown(start: int, end: int, wanted: int, limit: int) -> tuple[int, int]:
    """The span grown evenly to both sides, and shifted where it would leave 0…limit."""
    wanted = min(max(wanted, end - start), limit)
    start = min(max(start - (wanted - (end - start)) // 2, 0), limit - wanted)
    return start, start + wanted


def _mask_of(request: FittedRequest, picture: Image.Image) -> Image.Image | None:
    """The mask in the picture's size, white where it is repainted; None where there is none."""
    if request.mask is None:
        return None
    if request.mask == ALPHA:
        if picture.mode != "RGBA":
            raise BadDataError(_OPAQUE)
        grey = 255 - np.asarray(picture.getchannel("A"))
    else:
        grey = grey_of(read_picture(request.mask))
    mask = Image.fromarray(255 - grey if request.invert_mask else grey)
    if mask.size != picture.size:
        mask = mask.resize(picture.size, Image.Resampling.BILINEAR)
    return mask.filter(ImageFilter.GaussianBlur(request.mask_blur)) if request.mask_blur else mask


def _filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with the colours around the mask grown into it, coarsely at first and then finely."""
    kept = ImageOps.invert(mask)
    around = picture.convert("RGBA")
    around.putalpha(kept)
    around = around.convert("RGBa")  # colours weighted by how much of them is kept, so that none of the mask's bleed
    found = Image.new("RGBA", picture.size)
    for radius in _FILLS:
        blurred = around.filter(ImageFilter.GaussianBlur(radius)) if radius else around
        layer = blurred.convert("RGBA")
        for _ in range(2 if radius else 1):
            found = Image.alpha_composite(found, layer)
    return found.convert("RGB")


def _array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)
