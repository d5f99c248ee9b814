"""The picture that a network is to follow, as it reads it."""

import numpy as np
from PIL import Image

from ldmcli.control import INPAINT, TYPES, Control
from ldmcli.fitting import FittedRequest
from ldmcli.images.canvas import Canvas, resized
from ldmcli.images.edges import canny
from ldmcli.images.pixels import on_white, read_picture


def control_picture(request: FittedRequest, control: Control, canvas: Canvas | None, planes: int) -> np.ndarray:
    """A control's picture (planes, height, width), float32 in 0…1, in the size that is drawn: resized as the picture
    that is drawn on is, and cut out with it. Edges, where they are asked for, are those of the picture in that size.
    For inpainting, what is masked is -1, or 0 to a Union network. Raises as `read_picture` does."""
    mode = "L" if planes == 1 else "RGB"
    picture = on_white(read_picture(control.image))
    picture = picture.convert(mode) if control.canny is None else picture
    size = request.width, request.height
    if canvas is not None and canvas.whole is not None and request.inpaint_area == "masked":
        whole = resized(picture, canvas.whole.shape[1], canvas.whole.shape[0], request.resize)
        picture = whole.crop(canvas.box).resize(size, Image.Resampling.LANCZOS)
    picture = resized(picture, *size, request.resize)
    if control.canny is not None:
        picture = Image.fromarray(canny(np.asarray(picture), *control.canny))
    pixels = np.asarray(picture.convert(mode)).astype(np.float32) / 255
    pixels = pixels[None] if planes == 1 else pixels.transpose(2, 0, 1)
    if TYPES.get(control.type) == TYPES[INPAINT] and canvas is not None and canvas.mask is not None:
        pixels = np.where(canvas.mask, np.float32(control.masked), pixels)
    return np.ascontiguousarray(pixels)
