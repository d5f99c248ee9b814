"""Pictures and masks of image prompts, as they are read."""

import numpy as np
from PIL import Image

from ldmcli.errors import BadDataError
from ldmcli.fitting import FittedRequest
from ldmcli.images.canvas import Canvas, resized
from ldmcli.images.pixels import grey_of, on_white, read_picture

_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
_MAX_ASPECT = 100
_DEVIATION = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


def clip_pixels(picture: Image.Image, size: int) -> np.ndarray:
    """A picture (3, size, size) as CLIP reads it: its shorter side scaled to `size`, the middle cut out, and by channel
    less the mean and over the deviation of what CLIP was trained with. Source: CLIPImageProcessor of transformers."""
    shorter, longer = sorted(picture.size)
    scaled = size, int(size * longer / shorter)
    wide = picture.width > picture.height
    picture = picture.resize(scaled[::-1] if wide else scaled, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)))
    return np.ascontiguousarray(((pixels / np.float32(255) - _MEAN) / _DEVIATION).transpose(2, 0, 1))


def image_prompt(source: str | bytes, size: int) -> np.ndarray:
    """The picture of an image prompt, on white where it is transparent. Raises as `read_picture` does, and BadDataError
    for one of which next to nothing would be cut out."""
    picture = on_white(read_picture(source))
    if max(picture.size) > _MAX_ASPECT * min(picture.size):
        sides = f"a picture of {picture.width}x{picture.height} pixels"
        raise BadDataError(f"{sides} is too narrow for an image prompt, which is its middle square; cut one out of it.")
    return clip_pixels(picture, size)


def attention_mask(request: FittedRequest, source: str | bytes, canvas: Canvas | None) -> np.ndarray:
    """Where an image prompt counts (height, width), 1, and where not, 0, in the size that is drawn: resized as the
    picture that is drawn on is, and cut out with it. Raises as `read_picture` does."""
    mask = Image.fromarray(grey_of(read_picture(source)))
    size = request.width, request.height
    if canvas is not None and canvas.whole is not None and request.inpaint_area == "masked":
        whole = resized(mask, canvas.whole.shape[1], canvas.whole.shape[0], request.resize)
        mask = whole.crop(canvas.box).resize(size, Image.Resampling.LANCZOS)
    return (np.asarray(resized(mask, *size, request.resize)) > 127).astype(np.float32)
