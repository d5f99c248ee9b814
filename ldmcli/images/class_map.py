"""Semantic maps that users name: pictures in which each pixel is the number of a class."""

import numpy as np
from PIL import Image

from ldmcli.errors import BadDataError
from ldmcli.fitting import FittedRequest
from ldmcli.images.pixels import read_classes

NOTHING = 255  # in maps of 8 bits, what is of no class, as COCO-Stuff has it


def check_map(source: str | bytes, classes: int) -> None:
    """Raise BadDataError where a map has classes that the model does not know, or as `read_classes`."""
    found = read_classes(source)
    known = found[(found != NOTHING) | (classes > NOTHING)]
    if known.size == 0:
        raise BadDataError(f"the map has no class, only {NOTHING}, which stands for none.")
    if known.max() >= classes:
        more = f" and {NOTHING} for none" if classes <= NOTHING else ""
        raise BadDataError(f"the map has class {known.max()}, and the model knows 0 to {classes - 1}{more}.")


def map_of(request: FittedRequest) -> np.ndarray:
    """A request's map (height, width) int64 in its size; between pixels, the nearest counts."""
    assert request.map is not None
    found, size = read_classes(request.map), (request.width, request.height)
    if found.shape != size[::-1]:
        found = np.asarray(Image.fromarray(found.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    return found.astype(np.int64)
