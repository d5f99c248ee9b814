"""Semantic maps that users name: pictures in which each pixel is the number of a class."""

import logging

import numpy as np
from PIL import Image

from ldmcli.config import MapConfig
from ldmcli.errors import BadDataError
from ldmcli.fitting import FittedRequest
from ldmcli.images.pixels import Facts, facts_of, read_classes
from ldmcli.remarks import warn_once
from ldmcli.spec import GenerationRequest

_log = logging.getLogger(__name__)
NOTHING = 255  # in maps of 8 bits, what is of no class, as COCO-Stuff has it


def map_facts(request: GenerationRequest, conditioner: object) -> Facts:
    """The size and hash of a request's map; it says so where that is to be stretched. Raises BadDataError where the map
    has classes that the `conditioner`, if it reads any, does not know, or as `read_classes`."""
    assert request.map is not None
    if isinstance(conditioner, MapConfig):
        _check(read_classes(request.map), conditioner.classes)
    facts = facts_of(request.map)
    width, height = request.width or facts.width, request.height or facts.height
    if width * facts.height != height * facts.width:
        warn_once(_log, f"the map is {facts.shape}, which is of another shape: it is stretched")
    return facts


def _check(found: np.ndarray, classes: int) -> None:
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
